"""DINOv2 ViT-L/14: the features in which FD-DINOv2 is measured.

Network: Oquab et al. 2024 (arXiv 2304.07193). As a metric: Stein et al. 2023 (arXiv 2306.04675), and Karras et al. 2024
(arXiv 2312.02696), who report it beside FID.
"""

from __future__ import annotations

from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from fid.features import Extractor, Features, name_with_weights, to_rgb
from fid.weights import PublishedWeights, check_and_load, read_safetensors, read_tensors

NAME = "dinov2-vitl14"
SIZE, PATCH = 224, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels in [0, 1], per channel."""
OFFSET = 0.1
"""DINOv2 resamples its positions with the scale (side + 0.1) / stored side, so that rounding never loses a row; the
grid moves a little with it."""

WEIGHTS = PublishedWeights(
    files=("dinov2_vitl14_pretrain.pth",),
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    sha256_prefix="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
)


def vision_transformer(*, width: int = 1024, depth: int = 24, heads: int = 16) -> VisionTransformer:
    """DINOv2's network for 224 x 224 pixels, without memory: its weights have yet to be assigned."""
    with torch.device("meta"):
        return VisionTransformer(
            img_size=SIZE,
            patch_size=PATCH,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            init_values=1e-5,
            num_classes=0,
        )


def read_weights(file: Path, into: VisionTransformer) -> None:
    """Weights in the names of the published file (or timm's, which are the same). The token that only training masks
    patches with is left out, and the positions are resampled to the network's grid."""
    state = read_safetensors(file) if file.suffix == ".safetensors" else read_tensors(file)
    state.pop("mask_token", None)
    if "pos_embed" in state:
        state["pos_embed"] = resampled(state["pos_embed"], SIZE // PATCH)
    into.to_empty(device="cpu")
    check_and_load(file, state, into=into)


def resampled(positions: Tensor, side: int) -> Tensor:
    """Positions (1, 1 + n * n, width), the class token's first, for side x side patches."""
    token, grid = positions[:, :1], positions[:, 1:]
    stored = round(grid.shape[1] ** 0.5)
    if stored == side:
        return positions
    image = grid.unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
    scale = (side + OFFSET) / stored
    smaller = F.interpolate(image, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, smaller.flatten(2).transpose(1, 2)], dim=1)


class DINOv2Extractor(Extractor):
    """The normalised class token of images resized to 224 x 224 (bicubic, antialiased, neither rounded nor clipped)."""

    comparable = "the features are DINOv2's: the value is an FD-DINOv2, not an FID"

    def __init__(self, network: VisionTransformer, *, name: str, sha256: str, device: torch.device | str = "cpu"):
        super().__init__(device)
        self.name, self.sha256, self.dim = name, sha256, network.embed_dim
        self.network = network.to(self.device).eval().requires_grad_(False)

    def extract(self, images: Tensor) -> Features:
        x = F.interpolate(to_rgb(images).float(), (SIZE, SIZE), mode="bicubic", antialias=True) / 255
        mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
        return Features(self.network((x - mean) / std), None)


def open_dinov2(*, path: Path | None, device: torch.device | str, allow_unknown_weights: bool) -> Extractor:
    """The published weights, in the cache folder or at `path`; others only with `allow_unknown_weights`."""
    file = path if path is not None else WEIGHTS.find()
    sha256 = WEIGHTS.check(file, allow_unknown=allow_unknown_weights)
    network = vision_transformer()
    read_weights(file, network)
    name = name_with_weights(NAME, sha256, is_known=sha256.startswith(WEIGHTS.sha256_prefix))
    return DINOv2Extractor(network, name=name, sha256=sha256, device=device)
