"""[select]: the search for w (and cfg_scale)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from neon.config_table import Count, Range, Seed, check_fields
from neon.merge import MOST_W
from neon.sampling.options import Labels
from neon.seeds import NUM_SEEDS


@dataclass(frozen=True, kw_only=True, slots=True)
class Select:
    """The search for w (and cfg_scale) on one block of seeds."""

    w: tuple[Annotated[float, Range(least=-MOST_W, most=MOST_W)], ...]
    """strategy "search": the range to begin with (least and greatest value, and -1); "grid": the values to try, with 0,
    -1 and a random direction."""
    num_images: Annotated[int, Range(least=2, most=NUM_SEEDS)]
    """Size of the block. "grid" uses all of it at every point, "search" at most that many."""
    first_seed: Seed
    strategy: Literal["search", "grid"] = "search"
    start_images: Annotated[int, Range(least=4)] | None = None
    """"search": images of every point at first. None: 120, or as many as there are features, at least 2 per class."""
    budget_images: Count | None = None
    """"search": images of all points together, never exceeded. None: a third of what the grid would take."""
    snapshots: Literal["all", "last"] = "last"
    cfg_scale: tuple[float, ...] | None = None
    """As w: the range, or the values to try."""
    labels: Labels = "balanced"
    metric: str | None = None
    """Extractor whose Frechet distance chooses; None: the first of report.extractors."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, values in (("w", self.w), ("cfg_scale", self.cfg_scale)):
            if values is None:
                continue
            if not values:
                raise ValueError(f"{name} must name at least one value to try")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must name every value once, got {list(values)}")
