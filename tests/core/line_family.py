"""A family so small that everything about it can be computed by hand: images 1x4x4 whose pixels are a learned mean plus
noise.

Its sampler is exact in one line, its loss is a squared error, so whole runs take a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fid.features import Extractor, Features
from neon.family import Draws, Family
from neon.seeds import Rng


@dataclass(frozen=True, kw_only=True)
class Sampling:
    spread: float = 0.2
    cfg_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Objective:
    noise: float = 0.1


class Mean(nn.Module):
    def __init__(self, num_classes: int = 3, dropout: float = 0.0):
        super().__init__()
        self.mean = nn.Parameter(torch.linspace(-0.5, 0.5, num_classes * 16).view(num_classes, 1, 4, 4).clone())
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))


class Line(Family):
    name = "line"
    sampling = Sampling
    objective = Objective

    def build(self, arch: Mapping[str, object]) -> Mean:
        return Mean(**arch)

    def num_classes(self, model: nn.Module) -> int:
        return len(model.mean)

    def img_size(self, model: nn.Module) -> int:
        return 4

    def sample(self, model: nn.Module, rng: Rng, labels: Tensor | None, how: Sampling) -> tuple[Tensor, Tensor]:
        noise = rng.normal((1, 4, 4))
        if labels is None:
            labels = rng.integers(len(model.mean))
        return how.cfg_scale * model.mean[labels] + how.spread * noise, labels

    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: Objective) -> Draws:
        return {"noise": rng.normal((1, 4, 4))}

    def loss(self, model: nn.Module, codes: Tensor, labels: Tensor | None, draws: Draws, how: Objective) -> Tensor:
        data = codes.float() / 127.5 - 1 if codes.dtype == torch.uint8 else codes
        return (model.dropout(model.mean[labels]) - data - how.noise * draws["noise"]).square().sum((1, 2, 3))


class Pixels(Extractor):
    """The sixteen pixels in [0, 1] themselves."""

    name, dim, sha256 = "pixels", 16, "0" * 64
    comparable = "these are pixels"

    def extract(self, images: Tensor) -> Features:
        return Features(images.flatten(1).float() / 255, None)


def open_pixels(*, path: Path | None, device: torch.device | str, allow_unknown_weights: bool) -> Pixels:
    extractor = Pixels(device)
    extractor.name = "tests.core.line_family:open_pixels"
    return extractor
