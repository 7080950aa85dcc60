"""A small classifier of 28 x 28 Fashion-MNIST and its features, shipped with the project.

Trained by scripts/train_fashion_cnn.py on 25,000 images that neither the demo's base model nor its reference has seen.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fid.features import Extractor, Features, name_with_weights
from fid.files import sha256_of
from fid.weights import check_and_load, read_safetensors

WEIGHTS = Path(__file__).parent / "data" / "fashion_cnn.safetensors"


class FashionCNN(nn.Module):
    """uint8 grey images (B, 1, 28, 28) -> (features (B, 64), logits (B, 10)).

    LeNet's scheme: three convolutions (at 28, 14 and 7 pixels), then one hidden layer of 64 units, whose activations
    are the features.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 24, 48, 96)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.hidden = nn.Linear(96 * 7 * 7, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.to(self.head.weight.dtype) / 127.5 - 1
        for depth, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x if depth == 0 else F.max_pool2d(x, 2))))
        features = F.relu(self.hidden(F.dropout(x.flatten(1), 0.3, self.training)))
        return features, self.head(features)


class FashionExtractor(Extractor):
    """The 64 hidden units of the shipped classifier, and its 10 logits. Takes 28 x 28 grey images, or 32 x 32 ones with
    a frame of 2 pixels around them, as autoencoders need them."""

    dim = 64
    num_classes = 10
    comparable = (
        "the features are those of a small Fashion-MNIST classifier, "
        "not of the 2015-12-05 Inception that FID is defined by"
    )

    def __init__(self, network: FashionCNN, *, sha256: str, device: torch.device | str = "cpu"):
        super().__init__(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.sha256 = sha256
        self.name = name_with_weights("fashion-cnn", sha256, is_known=sha256 == sha256_of(WEIGHTS))

    def extract(self, images: Tensor) -> Features:
        if images.shape[1:] == (1, 32, 32):
            images = images[..., 2:-2, 2:-2]
        if images.shape[1:] != (1, 28, 28):
            raise ValueError(
                f"fashion-cnn takes grey images (B, 1, 28, 28), or padded to 32 x 32, got {tuple(images.shape)}"
            )
        return Features(*self.network(images))


def open_fashion_cnn(*, path: Path | None, device: torch.device | str, allow_unknown_weights: bool) -> Extractor:
    """The shipped classifier; other weights only with `allow_unknown_weights`."""
    file = path if path is not None else WEIGHTS
    sha256 = sha256_of(file)
    if sha256 != sha256_of(WEIGHTS) and not allow_unknown_weights:
        raise ValueError(f"{file}: not the shipped classifier {WEIGHTS}; pass --allow-unknown-weights to use it")
    network = FashionCNN()
    check_and_load(file, read_safetensors(file), into=network)
    return FashionExtractor(network, sha256=sha256, device=device)
