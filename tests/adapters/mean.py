"""An extractor for the tests: an image's mean and its left half's, in [0, 1]."""

from pathlib import Path

import torch
from torch import Tensor

from fid.features import Extractor, Features


class Mean(Extractor):
    name, dim, sha256, comparable = "tests.adapters.mean:open_mean", 2, "0" * 64, "these are means"

    def extract(self, images: Tensor) -> Features:
        x = images.float() / 255
        left = x[..., : x.shape[-1] // 2]
        return Features(torch.stack([x.mean((1, 2, 3)), left.mean((1, 2, 3))], 1), None)


def open_mean(*, path: Path | None, device: torch.device | str, allow_unknown_weights: bool) -> Mean:
    return Mean(device)
