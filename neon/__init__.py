"""Neon: improve a trained image generator by extrapolating away from its own samples (arXiv 2510.03597)."""

from neon.merge import LiveMerge, reverse_merge

__all__ = ["LiveMerge", "reverse_merge"]
__version__ = "0.1.0"
