"""The options of EDM's sampler ([sampling]) and of its losses ([train.objective], [finetune.objective])."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from neon.config_table import Fraction, NotNegative, Positive, Range, check_fields

Unbounded = Annotated[float, Range(finite=False)]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of Heun's method; the defaults are EDM's for 32 x 32 images."""

    num_steps: Annotated[int, Range(least=2)] = 18
    """Solver steps; network calls = 2 num_steps - 1."""
    sigma_min: Positive = 0.002
    """Smallest noise level, raised to the network's own."""
    sigma_max: Positive = 80.0
    """Largest noise level, lowered to the network's own."""
    rho: Positive = 7.0
    """Larger values put more steps at small noise levels."""
    S_churn: NotNegative = 0.0
    """Total noise added and removed again along the way; 0 is deterministic."""
    S_min: Unbounded = 0.0
    """Churn only noise levels above."""
    S_max: Unbounded = math.inf
    """Churn only noise levels below."""
    S_noise: float = 1.0
    """Standard deviation of the churned noise."""
    state: Literal["float64", "float32"] = "float64"
    """dtype of the image between network calls and of the churned noise. float32 is the published script for guided
    sampling, which also draws no noise in steps that S_min and S_max exclude."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which noise levels are trained, and what is done to the images and labels; see edm/loss.py."""

    kind: Literal["edm", "vp", "ve"] = "edm"
    P_mean: float = -1.2
    """edm: mean of ln sigma."""
    P_std: float = 1.2
    """edm: standard deviation of ln sigma."""
    sigma_data: float = 0.5
    """edm: standard deviation of the training images."""
    beta_d: float = 19.9
    """vp: slope of the noise rate."""
    beta_min: float = 0.1
    """vp: noise rate at t = 0."""
    epsilon_t: float = 1e-5
    """vp: smallest time."""
    sigma_min: float = 0.02
    """ve: smallest noise level."""
    sigma_max: float = 100.0
    """ve: largest noise level."""
    augment: Fraction = 0.0
    """Probability of each augmentation (edm/augment.py); above 0 every image is also mirrored by a fair coin."""
    label_drop: Fraction | None = None
    """Share of images trained with the null class; None: the network's own `label_dropout`."""

    def __post_init__(self) -> None:
        check_fields(self)
