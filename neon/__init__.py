"""Neon: improve a trained image generator by extrapolating away from its own samples (arXiv 2510.03597)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neon.library.evaluate import evaluate
    from neon.library.improve import Improved, improve
    from neon.merge import LiveMerge, reverse_merge
    from neon.seeds import ImageRng

__all__ = ["ImageRng", "Improved", "LiveMerge", "evaluate", "improve", "reverse_merge"]
__version__ = "0.1.0"

HOMES = {
    "ImageRng": "neon.seeds",
    "Improved": "neon.library.improve",
    "LiveMerge": "neon.merge",
    "evaluate": "neon.library.evaluate",
    "improve": "neon.library.improve",
    "reverse_merge": "neon.merge",
}
"""Where the public names live. They are imported when they are asked for: `neon --help` needs no torch."""


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'neon' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
