"""[select]: the search for w (and cfg_scale)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from neon.binding import Range, Seed, check_fields
from neon.sampling.options import Labels
from neon.seeds import NUM_SEEDS


@dataclass(frozen=True, kw_only=True, slots=True)
class Select:
    """The search for w (and cfg_scale) on one block of seeds. w = 0, w = -1 and a random direction are always there."""

    w: tuple[float, ...]
    num_images: Annotated[int, Range(least=2, most=NUM_SEEDS)]
    first_seed: Seed
    snapshots: Literal["all", "last"] = "last"
    cfg_scale: tuple[float, ...] | None = None
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
