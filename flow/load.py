"""Flow networks: built from constructor arguments, which TorchCFM's files do not hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flow.presets import MODELS
from flow.unet import UNet
from neon.checkpoints.checkpoint import Checkpoint
from neon.config_table import construct


def unet(arch: Mapping[str, object]) -> UNet:
    """A freshly initialised network. Raises ValueError if the arguments do not fit."""
    if arch.get("learn_sigma"):
        raise ValueError("arch.learn_sigma: a velocity has as many channels as the image")
    return construct(UNet, arch, "arch")


def arch_from_shapes(checkpoint: Checkpoint) -> dict[str, object]:
    """The constructor arguments of a file that holds tensors only.

    Heads, dropout and image size are not in the shapes, so only networks are recognised that TorchCFM's scripts make:
    the published ones, at any num_channels, with any number of classes. Raises ValueError for others.
    """
    shapes = {name: tuple(value.shape) for name, value in checkpoint.specs.items()}
    _, *num_channels = shapes.get("time_embed.0.weight", (0,))
    classes, *_ = shapes.get("label_emb.weight", (0,))
    for model in MODELS.values() if num_channels else ():
        arch = {**model, "num_channels": num_channels[0]} | ({"num_classes": classes} if classes else {})
        if _shapes(arch) == shapes:
            return arch
    raise ValueError(
        f"{checkpoint.path} does not say how its network is built, and its tensors are not those of a network that "
        f"TorchCFM's scripts make ({', '.join(MODELS)}). Write it with neon.checkpoints.checkpoint.write, whose "
        "metadata hold the constructor arguments as `arch`"
    )


def _shapes(arch: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in unet(arch).state_dict().items()}
