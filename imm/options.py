"""The options of IMM's samplers ([sampling]) and of its loss ([train.objective], [finetune.objective])."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from neon.config_table import Count, Fraction, NotNegative, Positive, Range, check_fields

Grid = Literal["uniform", "edm", "explicit"]
Times = Literal["uniform", "lognormal", "lognormal-published"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How IMM samples."""

    num_steps: Count = 8
    """Network calls (of twice as many images if guided)."""
    cfg_scale: float = 1.0
    """Classifier-free guidance of the network's output; 1 is none."""
    grid: Grid = "uniform"
    """uniform: in t; edm: as EDM spaces sigma (rho 7); explicit: the noise levels of mid_nt."""
    mid_nt: tuple[float, ...] = ()
    """For grid = "explicit": noise levels sigma / alpha between T and eps, descending; num_steps is one more than their
    number."""
    sampler: Literal["pushforward", "restart"] = "pushforward"
    """pushforward: from each time to the next; restart: to the data, then noise again (imm/sampler.py)."""
    state: Literal["float32", "float64"] = "float32"
    """dtype of times and state: Neon's numbers were made in float32, those of the base models in float64."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mid_nt and self.grid != "explicit":
            raise ValueError(f"mid_nt belongs to grid = 'explicit', the grid is {self.grid!r}")
        if self.grid == "explicit" and self.num_steps != len(self.mid_nt) + 1:
            raise ValueError(
                f"mid_nt names {len(self.mid_nt)} times in between, so num_steps must be {len(self.mid_nt) + 1}, got "
                f"{self.num_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The defaults are Neon's ImageNet-256 recipe."""

    group_size: Annotated[int, Range(least=2)] = 4
    """m: images that share their times and are compared with each other; the batch must be a multiple of it."""
    bandwidth: Positive = 1.0
    """sigma of the kernel."""
    a: float = 2.0
    """Exponent of alpha in the weight of a group."""
    b: float = 4.0
    """Shift of the log-SNR in the weight of a group."""
    k: float = 12.0
    """r lies 2^-k of the whole range of nt below t."""
    label_drop: Fraction = 0.1
    """Share of images trained without their class, which guidance needs."""
    min_gap: NotNegative = 1e-4
    """Least t - r; 0 for none."""
    times: Times = "uniform"
    """How t and s are drawn; for "lognormal-published" the least t is at nt = 1 instead of eps."""
    P_mean: float = -1.1
    """lognormal: mean of log nt."""
    P_std: Positive = 2.0
    """lognormal: standard deviation of log nt."""

    def __post_init__(self) -> None:
        check_fields(self)
