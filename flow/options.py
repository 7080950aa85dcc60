"""The options of the flow family: how it is sampled ([sampling]) and trained ([train.objective],
[finetune.objective])."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neon.config_table import Count, Fraction, NotNegative, Positive, check_fields

Solver = Literal["dopri5", "euler"]
ErrorNorm = Literal["image", "batch"]
Kind = Literal["otcfm", "icfm", "fm", "si", "sb"]
Pairing = Literal["assigned", "sampled", "sinkhorn"]
PAIRED: tuple[Kind, ...] = ("otcfm", "sb")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the flow is integrated."""

    solver: Solver = "dopri5"
    """dopri5: adaptive, as the published FIDs were measured; euler: num_steps equal steps."""
    num_steps: Count | None = None
    """Network calls of Euler's method."""
    tol: Positive = 1e-5
    """Relative and absolute tolerance of dopri5. Below the network's own rounding (1e-2 in bf16, 1e-3 in TF32) it only
    costs steps."""
    error_norm: ErrorNorm = "image"
    """dopri5's error is measured per image, or over the whole batch, as published: images then depend on their batch
    and on the number of GPUs."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.solver == "euler" and self.num_steps is None:
            raise ValueError("solver = 'euler' needs num_steps >= 1, got None")
        if self.solver == "dopri5" and self.num_steps is not None:
            raise ValueError(
                f"num_steps ({self.num_steps}) belongs to solver = 'euler': dopri5 chooses its steps by tol"
            )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which path is learned (flow/loss.py). The defaults are TorchCFM's, but for the pairing."""

    kind: Kind = "otcfm"
    """icfm: straight lines; otcfm: straight lines between noise and images paired by optimal transport; fm: Lipman's
    path to noise of standard deviation sigma around the image; si: variance preserving; sb: Schroedinger bridge between
    pairs."""
    sigma: NotNegative = 0.0
    """Standard deviation of the path's own noise: constant, in the middle of the bridge for sb, at the image for fm."""
    pairing: Pairing = "assigned"
    """otcfm and sb. assigned: every image once, with its noise in the best assignment of the batch. sampled: pairs
    drawn from the plan with replacement, as published, which leaves out 37 % of a batch. sinkhorn (sb): drawn from the
    plan of entropy 2 sigma^2."""
    flip: Fraction = 0.0
    """Share of stored images that are mirrored; published: 0.5."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sigma == 0 and self.kind == "sb":
            raise ValueError("sigma must be > 0 for kind = 'sb', got 0")
        if self.kind == "fm" and self.sigma >= 1:
            raise ValueError(f"sigma must be < 1 for kind = 'fm', got {self.sigma}")
        if self.pairing == "sinkhorn" and self.kind != "sb":
            raise ValueError(f"pairing = 'sinkhorn' belongs to kind = 'sb', the kind is {self.kind!r}")

    @property
    def is_paired(self) -> bool:
        return self.kind in PAIRED

    @property
    def has_path_noise(self) -> bool:
        """Whether the path adds noise of its own to the line (fm's is the noise that it starts from)."""
        return self.sigma > 0 and self.kind != "fm"
