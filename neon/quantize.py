"""Between float images in [-1, 1] and uint8 ones. The rounding rules change an FID, so the config names one and the
result repeats it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["edm", "truncate", "round"]
RULES: tuple[str, ...] = get_args(Rule)


class DivergedError(ValueError):
    """A sampler or decoder gave images that are not numbers."""


def to_uint8(images: Tensor, rule: Rule) -> Tensor:
    """Quantise float images in [-1, 1] (values outside are clipped) to uint8 of the same shape.

    edm       trunc(127.5 x + 128): NVIDIA's EDM scripts, TorchCFM. No bias on average.
    truncate  trunc(255 (x + 1) / 2): the scripts of VAR, xAR and IMM; darkens by 0.5 grey levels on average.
    round     round(127.5 (x + 1)): nearest level; our own runs.

    The arithmetic is done in the dtype of `images`, at least float32. Raises ValueError for an unknown rule and
    DivergedError for a value that is not a number.
    """
    if rule not in RULES:
        raise ValueError(f"unknown uint8 rule {rule!r}; choose one of {', '.join(RULES)}")
    x = images if images.dtype == torch.float64 else images.float()
    if torch.isnan(x).any():
        raise DivergedError("the images to be quantised contain NaN: the sampler or decoder diverged")
    if rule == "edm":
        return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    if rule == "truncate":
        return ((x + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8)
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images of any shape as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
