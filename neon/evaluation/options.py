"""[report]: the numbers that are reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from neon.config_table import Range, Seed, check_fields
from neon.sampling.options import Labels
from neon.seeds import NUM_SEEDS


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The numbers that are reported: another block of seeds, disjoint from synth and select."""

    num_images: Annotated[int, Range(least=2, most=NUM_SEEDS)]
    first_seed: Seed
    extractors: Mapping[str, str]
    """Extractor name -> reference statistics file; the first one is the headline."""
    labels: Labels = "balanced"
    cfg_scale: float | Literal["selected"] | None = None
    inception: str | None = None
    """Weights of the FID Inception; None: the cache."""
    num_shown: Annotated[int, Range(least=0)] = 64
    """Images in the page's picture grids."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.extractors:
            raise ValueError("extractors must name at least one extractor and its reference file")
