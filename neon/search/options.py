"""[select]: the search for w (and cfg_scale)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neon.binding import at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class Select:
    """The search for w (and cfg_scale) on one block of seeds. w = 0, w = -1 and a random direction are always there."""

    w: tuple[float, ...]
    num_images: int
    first_seed: int
    snapshots: Literal["all", "last"] = "last"
    cfg_scale: tuple[float, ...] | None = None
    labels: Literal["balanced", "drawn"] = "balanced"
    metric: str | None = None
    """Extractor whose Frechet distance chooses; None: the first of report.extractors."""

    def __post_init__(self) -> None:
        at_least(2, num_images=self.num_images)
        at_least(0, first_seed=self.first_seed)
        if not self.w:
            raise ValueError("w must name at least one value to try")
