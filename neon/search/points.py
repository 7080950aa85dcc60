"""What the search compares: points (weights and guidance), the images they are judged by, their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from neon.sampling.options import Labels


@dataclass(frozen=True, kw_only=True)
class Point:
    """One set of weights and one guidance: base - w (direction - base), direction = a snapshot or random of its
    norm."""

    w: float
    snapshot: str
    cfg_scale: float | None = None
    direction: Literal["synth", "random"] = "synth"

    def label(self) -> str:
        parts = [f"w = {self.w:g}"]
        if self.cfg_scale is not None:
            parts.append(f"cfg {self.cfg_scale:g}")
        if self.direction == "random":
            parts.append("random direction")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Block:
    """The images that a point is judged by."""

    labels: Labels
    first_seed: int
    num_images: int
    num_shown: int = 0
    first_label: int = 0
    """Class of the first image where labels are balanced; those of the others follow in turn."""


@dataclass(frozen=True)
class Score:
    """A point with what it scored on a block. key: its name in the ledger and of its picture file. made_with: versions,
    device and ranks of the process that computed it; None where an earlier version did not note them."""

    point: Point
    metrics: dict[str, float]
    seconds: dict[str, float]
    key: str
    made_with: Mapping[str, object] = field(default_factory=dict)
    failed: str | None = None
    """Why there are no metrics: its images were no numbers."""


def points_to_try(snapshots: Sequence[str], w: Sequence[float], cfg_scales: Sequence[float] | None) -> list[Point]:
    """The points to try: every w, with w = 0 and w = -1, for every snapshot and cfg_scale; the base only once per
    cfg_scale."""
    tried = sorted({0.0, -1.0, *w})
    found = [
        Point(w=value, snapshot=snapshot, cfg_scale=cfg_scale)
        for snapshot in snapshots
        for cfg_scale in (cfg_scales or (None,))
        for value in tried
        if value != 0 or snapshot == snapshots[-1]
    ]
    return sorted(found, key=lambda p: snapshots.index(p.snapshot))


def best(scores: Sequence[Score], metric: str) -> Score:
    """The score with the least distance; the earliest of equal ones. Raises ValueError if no point gave images."""
    finite = [score for score in scores if score.failed is None]
    if not finite:
        raise ValueError(f"none of the {len(scores)} points gave images that are numbers")
    return min(finite, key=lambda s: s.metrics[metric])


def parabola_minimum(scores: Sequence[Score], metric: str) -> float | None:
    """w of the vertex of the parabola through the best point and its two neighbours: the curve is locally quadratic in
    w (paper, App. C). None if the best point is at the border or the three points do not bend upwards."""
    ordered = sorted((s for s in scores if s.failed is None), key=lambda s: s.point.w)
    i = min(range(len(ordered)), key=lambda k: ordered[k].metrics[metric])
    if i in (0, len(ordered) - 1):
        return None
    w, y = zip(*((s.point.w, s.metrics[metric]) for s in ordered[i - 1 : i + 2]), strict=True)
    curvature, slope, _ = np.polyfit(w, y, 2)
    return float(-slope / (2 * curvature)) if curvature > 0 else None
