"""Published sizes of xAR (arXiv 2502.20388, table 2) and the sampling settings of the base models and of Neon's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from xar.transformer import XARArch

Protocol = Literal["base", "neon"]

SIZES: Mapping[str, XARArch] = {
    "xar_base": XARArch(width=768, num_heads=12, encoder_depth=8, decoder_depth=8),
    "xar_large": XARArch(width=1024, num_heads=16, encoder_depth=16, decoder_depth=16),
    "xar_huge": XARArch(width=1280, num_heads=16, encoder_depth=20, decoder_depth=20),
}
"""173 M, 608 M and 1186 M parameters."""

CFG_SCALE: Mapping[Protocol, Mapping[str, float]] = {
    "base": {"xar_base": 2.7, "xar_large": 2.3, "xar_huge": 2.2},
    "neon": {"xar_base": 3.8, "xar_large": 2.7},
}
"""Guidance of the last cell. base: the xAR authors' (FID 1.72, 1.28), also used to draw S. neon: Neon's optimum (FID
1.31, 1.02), from the commands in the Neon authors' notes; their README prints the base models' values instead."""

NUM_STEPS: Mapping[str, int] = {"xar_base": 40, "xar_large": 50, "xar_huge": 50}
"""Steps per cell, the same in both protocols (Neon's README swaps those of xar_base and xar_large)."""
