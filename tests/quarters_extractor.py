"""A feature network that costs nothing, for tests of everything around it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fid.features import Extractor, Features, to_rgb
from fid.moments import Moments
from fid.reference import write_reference


class Quarters(Extractor):
    """The mean colour of every quarter of the image: 12 features."""

    name, dim, sha256, comparable = "quarters", 12, "0" * 64, "not the FID Inception"

    def extract(self, images: Tensor) -> Features:
        return Features(nn.functional.adaptive_avg_pool2d(to_rgb(images).float(), 2).flatten(1), None)


def open_quarters(*, path: Path | None, device: torch.device | str, allow_unknown_weights: bool) -> Extractor:
    return Quarters(device)


def write_statistics(path: Path, size: int = 32) -> None:
    """Reference statistics of 64 random images."""
    images = torch.randint(256, (64, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    moments = Moments(Quarters.dim)
    moments.update(Quarters()(images).pool)
    write_reference(path, moments, {"extractor": Quarters.name})
