"""Files as TorchCFM's training script writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from flow.family import Flow
from tests import goldens

TINY = {
    "dim": [3, 8, 8],
    "num_channels": 64,
    "num_res_blocks": 1,
    "channel_mult": [1, 1],
    "attention_resolutions": "4",
    "num_head_channels": 32,
}


def write_checkpoint(path: Path, arch: dict, prefix: str = "") -> nn.Module:
    """The five entries of tests/manifests/flow/checkpoint_layout.json, after two updates; returns the network of
    `ema_model`."""
    net = goldens.seed_by_name(Flow().build(arch))
    average = {prefix + name: value.detach().clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 5000) / 5000)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):  # the first update has rate 0
        optimizer.step()
        scheduler.step()
    raw = {prefix + name: value.detach() for name, value in net.state_dict().items()}
    state = {
        "net_model": raw,
        "ema_model": average,
        "sched": scheduler.state_dict(),
        "optim": optimizer.state_dict(),
        "step": 2,
    }
    torch.save(state, path)
    net.load_state_dict({name.removeprefix(prefix): value for name, value in average.items()})
    return net.eval().requires_grad_(False)
