"""Published sizes of VAR (arXiv 2404.02905, table 1 and their repository), and the guidance of published numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from var.transformer import VARArch

Protocol = Literal["base", "neon"]

PATCH_NUMS: Mapping[int, tuple[int, ...]] = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Image side -> side of the token map of every scale. One tokeniser file serves the two resolutions with ten scales."""

IMAGE_SIDE: Mapping[str, int] = {"d16": 256, "d20": 256, "d24": 256, "d30": 256, "d36": 512}

TOP_K, TOP_P = 900, 0.95

CFG_SCALE: Mapping[Protocol, Mapping[int, float]] = {"base": {256: 1.5, 512: 2.0}, "neon": {256: 2.8, 512: 3.2}}
"""By image side. neon: Neon's optimum (FID 2.01, 1.70), from the commands in the authors' notes; the defaults in their
scripts are 2.9 and 4.0. base: VAR's own protocol at 256 px (not verified), and at 512 px the guidance with which S was
drawn (there is no published command for the base); S at 256 px was drawn with 1.25."""


def published(name: str) -> VARArch:
    """The network called d16, d20, d24, d30 (256 px) or d36 (512 px). Raises ValueError for another name."""
    if name not in IMAGE_SIDE:
        raise ValueError(f"no published VAR {name!r}; choose one of {', '.join(IMAGE_SIDE)}")
    depth = int(name.removeprefix("d"))
    return VARArch(
        depth=depth,
        embed_dim=64 * depth,
        heads=depth,
        patch_nums=PATCH_NUMS[IMAGE_SIDE[name]],
        shared_aln=name == "d36",
        drop_path=0.1 * depth / 24,
    )
