"""Published networks as data. Source: TorchCFM 1.0.7 (Tong et al. 2024, arXiv 2302.00482)."""

from __future__ import annotations

CIFAR10: dict[str, object] = {
    "dim": [3, 32, 32],
    "num_channels": 128,
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 2, 2],
    "num_heads": 4,
    "num_head_channels": 64,
    "attention_resolutions": "16",
    "dropout": 0.1,
}
"""The network of all published checkpoints (otcfm, cfm, fm). 35,746,307 parameters."""

MNIST28: dict[str, object] = {
    "dim": [1, 28, 28],
    "num_channels": 32,
    "num_res_blocks": 1,
    "class_cond": True,
    "num_classes": 10,
}
"""The network of TorchCFM's MNIST examples. Its level of width 32 does not see the time: the norm
after it has one channel per group, which removes what the embedding adds."""

MODELS: dict[str, dict[str, object]] = {
    "cifar10_uncond": CIFAR10,
    "cifar10_classcond": {**CIFAR10, "class_cond": True, "num_classes": 10},
    "mnist28_classcond": MNIST28,
}
"""Constructor arguments by the name of the manifest that their state dict equals."""

EULER_STEPS = 100
"""Steps of TorchCFM's evaluation with Euler; Neon's table says 100 network calls."""
