"""[report]: the numbers that are reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from neon.binding import at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The numbers that are reported: another block of seeds, disjoint from synth and select."""

    num_images: int
    first_seed: int
    extractors: Mapping[str, str]
    """Extractor name -> reference statistics file; the first one is the headline."""
    labels: Literal["balanced", "drawn"] = "balanced"
    cfg_scale: float | Literal["selected"] | None = None
    inception: str | None = None
    """Weights of the FID Inception; None: the cache."""
    num_shown: int = 64
    """Images in the page's picture grids."""

    def __post_init__(self) -> None:
        at_least(2, num_images=self.num_images)
        at_least(0, first_seed=self.first_seed, num_shown=self.num_shown)
        if not self.extractors:
            raise ValueError("extractors must name at least one extractor and its reference file")
