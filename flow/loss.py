"""Flow matching: regress the velocity of a path from noise x0 at t = 0 to an image x1 at t = 1.

Lipman et al. 2023 (arXiv 2210.02747), Tong et al. 2024 (arXiv 2302.00482, table 1), Albergo and Vanden-Eijnden 2023
(arXiv 2209.15571).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from flow.coupling import assigned, exact_plan, sampled_pairs, sinkhorn_plan, transport_cost

Kind = Literal["otcfm", "icfm", "fm", "si", "sb"]
Pairing = Literal["assigned", "sampled", "sinkhorn"]
PAIRED: tuple[Kind, ...] = ("otcfm", "sb")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which path is learned. The defaults are TorchCFM's, but for the pairing."""

    kind: Kind = "otcfm"
    """icfm: straight lines; otcfm: straight lines between noise and images paired by optimal transport; fm: Lipman's
    path to noise of standard deviation sigma around the image; si: variance preserving; sb: Schroedinger bridge between
    pairs."""
    sigma: float = 0.0
    """Standard deviation of the path's own noise: constant, in the middle of the bridge for sb, at the image for fm."""
    pairing: Pairing = "assigned"
    """otcfm and sb. assigned: every image once, with its noise in the best assignment of the batch. sampled: pairs
    drawn from the plan with replacement, as published, which leaves out 37 % of a batch. sinkhorn: drawn from the plan
    of entropy 2 sigma^2
    (sb)."""
    flip: float = 0.0
    """Share of stored images that are mirrored; published: 0.5."""

    def __post_init__(self) -> None:
        for name, kind in (("kind", Kind), ("pairing", Pairing)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"objective.{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}"
                )
        if self.sigma < 0 or (self.sigma == 0 and self.kind == "sb"):
            raise ValueError(f"objective.sigma must be >= 0, and > 0 for sb, got {self.sigma}")
        if self.kind == "fm" and self.sigma >= 1:
            raise ValueError(f"objective.sigma must be < 1 for fm, got {self.sigma}")
        if self.pairing == "sinkhorn" and self.kind != "sb":
            raise ValueError(f"objective.pairing = 'sinkhorn' belongs to kind = 'sb', the kind is {self.kind!r}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"objective.flip must be in [0, 1], got {self.flip}")

    @property
    def is_paired(self) -> bool:
        return self.kind in PAIRED

    @property
    def has_path_noise(self) -> bool:
        """Whether the path adds noise of its own to the line (fm's is the noise that it starts from)."""
        return self.sigma > 0 and self.kind != "fm"

    def pairs(self, noise: Tensor, images: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """Indices (B,), (B,) of the noises and images that go together. uniform: (B,) float64, if they are drawn."""
        cost = transport_cost(noise, images)
        if uniform is None:
            return torch.argsort(assigned(cost)), torch.arange(len(images))
        return sampled_pairs(
            sinkhorn_plan(cost, 2 * self.sigma**2) if self.pairing == "sinkhorn" else exact_plan(cost), uniform
        )


def path(how: Objective, noise: Tensor, images: Tensor, t: Tensor, path_noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """x_t and its velocity u_t. noise, images, path_noise (if how.has_path_noise): (B, ...) alike; t: (B,) on [0,
    1)."""
    time = t.view(-1, *[1] * (images.ndim - 1))
    if how.kind == "fm":
        spread = 1 - (1 - how.sigma) * time
        x_t = time * images + spread * noise
        return x_t, (images - (1 - how.sigma) * x_t) / spread
    if how.kind == "si":
        angle = math.pi / 2 * time
        mean = angle.cos() * noise + angle.sin() * images
        velocity = math.pi / 2 * (angle.cos() * images - angle.sin() * noise)
    else:
        mean = time * images + (1 - time) * noise
        velocity = images - noise
    if path_noise is None:
        return mean, velocity
    if how.kind == "sb":
        x_t = mean + how.sigma * (time * (1 - time)).sqrt() * path_noise
        return x_t, (1 - 2 * time) / (2 * time * (1 - time) + 1e-8) * (x_t - mean) + velocity
    return mean + how.sigma * path_noise, velocity
