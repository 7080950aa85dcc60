"""What a search is asked for, and the places that it begins with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neon.search.surface import Place

CLOSER = 0.5
"""Share of the ranges of w and cfg_scale, around the optimum, in which a plane is searched a second time."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is searched and what it may cost."""

    w: tuple[float, float]
    """Range to begin with; it extends where the optimum lies at its edge."""
    cfg_scale: tuple[float, float] | None
    """Range, not extended; None: the family has no guidance."""
    start_images: int
    """Images of every point at first; doubled where the decision needs it. A multiple of num_classes."""
    most_images: int
    """Of every point: the size of the selection block."""
    budget_images: int
    report_images: int
    """What the choice is reported with: a gain that so many images could not show is not searched for."""
    decisive_images: int = 0
    """Of every point that the choice rests on: with fewer, the bias of few images decides (choose.PER_FEATURE)."""
    num_classes: int = 1
    """Period of the labels: image i has the label i % num_classes. 1: labels are drawn, or there are none."""

    @property
    def is_plane(self) -> bool:
        """Whether w and cfg_scale are searched together."""
        return self.cfg_scale is not None and self.cfg_scale[0] < self.cfg_scale[1]


def first_places(plan: Plan) -> list[Place]:
    """w: both ends and the base. (w, cfg_scale): six places that determine a quadratic surface, with the base at both
    ends of cfg_scale."""
    low, high = plan.w
    if not plan.is_plane or plan.cfg_scale is None:
        cfg_scale = 0.0 if plan.cfg_scale is None else plan.cfg_scale[0]
        return [Place(w, cfg_scale) for w in dict.fromkeys((0.0, low, high))]
    small, large = plan.cfg_scale
    middle = (small + large) / 2
    return [
        Place(0.0, small),
        Place(0.0, large),
        Place(high, small),
        Place(high, large),
        Place(high / 2, middle),
        Place(low, middle),
    ]


def places_around(plan: Plan) -> list[Place]:
    """Seven places that determine a quadratic surface by themselves."""
    assert plan.cfg_scale is not None
    (low, high), (small, large) = plan.w, plan.cfg_scale
    middle = Place((low + high) / 2, (small + large) / 2)
    return [middle, *(Place(w, c) for c in (small, large) for w in (low, middle.w, high))]


def around(value: float, low: float, high: float) -> tuple[float, float]:
    """`CLOSER` of a range, around a value if the range has room for it there."""
    half = CLOSER * (high - low) / 2
    middle = min(max(value, low + half), high - half)
    return round(middle - half, 4), round(middle + half, 4)


def spaced(low: float, high: float, count: int) -> list[float]:
    """Rounded, so that a place looks in the ledger as it does on the page."""
    values = torch.linspace(low, high, count, dtype=torch.float64).tolist() if high > low else [low]
    return [round(value, 4) for value in values]
