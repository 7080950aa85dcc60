"""Denoising score matching: the losses of EDM, VP and VE (Karras et al. 2022, arXiv 2206.00364, table 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from edm.precond import vp_sigma


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which noise levels are trained and what a pixel's error weighs."""

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
    augment: float = 0.0
    """Probability of each augmentation (edm/augment.py); above 0 every image is also mirrored by a fair coin."""
    label_drop: float | None = None
    """Probability that an image is trained with the null class; None: the network's own `label_dropout`."""

    def __post_init__(self) -> None:
        if self.kind not in ("edm", "vp", "ve"):
            raise ValueError(f"objective.kind must be edm, vp or ve, got {self.kind!r}")
        if not 0 <= self.augment <= 1:
            raise ValueError(f"objective.augment must be in [0, 1], got {self.augment}")
        if self.label_drop is not None and not 0 <= self.label_drop <= 1:
            raise ValueError(f"objective.label_drop must be in [0, 1], got {self.label_drop}")

    def sigma(self, level: Tensor) -> Tensor:
        """Noise levels from draws of the same shape: unit normals for edm, uniforms in [0, 1) for vp and ve."""
        if self.kind == "edm":
            return (self.P_std * level + self.P_mean).exp()
        if self.kind == "vp":
            return vp_sigma(1 + level * (self.epsilon_t - 1), beta_d=self.beta_d, beta_min=self.beta_min)
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** level

    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error at a noise level."""
        if self.kind == "edm":
            return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return 1 / sigma**2


def pixel_losses(
    objective: Objective,
    model: nn.Module,
    images: Tensor,
    class_labels: Tensor | None,
    *,
    level: Tensor,
    noise: Tensor,
    augment_labels: Tensor | None = None,
) -> Tensor:
    """weight (D(images + sigma noise; sigma) - images)^2, unreduced.

    images, noise: (B, C, R, R), images in [-1, 1]. level: (B, 1, 1, 1), see `Objective.sigma`.
    class_labels: (B, label_dim) one-hot, zero rows for the null class.
    """
    sigma = objective.sigma(level)
    denoised = model(images + noise * sigma, sigma, class_labels, augment_labels=augment_labels)
    return objective.weight(sigma) * (denoised - images) ** 2
