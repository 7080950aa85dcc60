"""A small diffusers pipeline of Fashion-MNIST, trained with diffusers alone, as the base of configs/diffusers_*.toml.

python scripts/diffusers_fashion.py --kind ddim && neon run configs/diffusers_ddim.toml    # a UNet2DModel, epsilon
python scripts/diffusers_fashion.py --kind flow && neon run configs/diffusers_flow.toml    # the same network, velocity
Training takes about 10 minutes on one CPU core. Expected result: results/diffusers_fashion.json
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import diffusers
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


def network() -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 48),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        add_attention=False,
    )


def noised(
    scheduler: diffusers.SchedulerMixin, x: Tensor, noise: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, target) as diffusers' own training scripts make them."""
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        t = scheduler.timesteps[index]
        return scheduler.scale_noise(x, t, noise), t, noise - x
    return scheduler.add_noise(x, noise, index), index, noise


@click.command()
@click.option("--kind", type=click.Choice(["ddim", "flow"]), required=True)
@click.option("--updates", default=800, show_default=True)
@click.option("--batch", default=32, show_default=True)
@click.option("--lr", default=2e-3, show_default=True, help="Highest rate; it falls to 0 along a cosine.")
def main(kind: str, updates: int, batch: int, lr: float) -> None:
    """Train and save runs/diffusers_KIND_base, a pipeline folder."""
    torch.manual_seed(0)
    with np.load(ROOT / "demo" / "fashion_base.npz") as data:
        images = torch.from_numpy(data["images"])[:, None].float() / 127.5 - 1
    model = network()
    is_flow = kind == "flow"
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if is_flow else diffusers.DDIMScheduler(clip_sample=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    total = 0.0
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (update + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * update / updates))
        x = images[torch.randint(len(images), (batch,))]
        x_t, t, target = noised(scheduler, x, torch.randn_like(x), torch.randint(1000, (batch,)))
        loss = (model(x_t, t).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (update + 1) % 100 == 0:
            print(f"{update + 1} updates, loss {total / 100:.4f}", flush=True)
            total = 0.0
    pipeline = (diffusers.DDPMPipeline if is_flow else diffusers.DDIMPipeline)(model, scheduler)
    pipeline.save_pretrained(ROOT / "runs" / f"diffusers_{kind}_base")


if __name__ == "__main__":
    main()
