"""What a search found, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from neon.search.surface import Place, Surface

Reason = Literal["gain", "budget", "images", "flat", "edge"]


@dataclass(frozen=True)
class Found:
    """The choice and how it came about."""

    place: Place
    base: Place
    """w = 0 at the cfg_scale that suits the base best."""
    reason: Reason
    surface: Surface
    """From the last fit: the whole range, and finely around the choice."""
    whole: Surface
    """Over the whole range."""
    points: Sequence[Place]
    """All evaluated places, in the order in which they came."""
    failed: Sequence[Place]
    """Those among them whose images were not finite."""
    num_images: int
    """Of every point in the last fit; on a plane, at most."""
    images_spent: int
    gain: float
    """Expected gain of knowing the curve exactly."""
    noise: float
    """What the report's images can tell apart."""
    is_at_edge: bool
    """Whether a lower distance may lie beyond the range: nothing was looked at there."""
