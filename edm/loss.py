"""Denoising score matching: the losses of EDM, VP and VE (Karras et al. 2022, arXiv 2206.00364, table 1)."""

from __future__ import annotations

from torch import Tensor, nn

from edm.options import Objective
from edm.precond import vp_sigma


def noise_level(how: Objective, level: Tensor) -> Tensor:
    """sigma from draws of the same shape: unit normals for edm, uniforms in [0, 1) for vp and ve."""
    if how.kind == "edm":
        return (how.P_std * level + how.P_mean).exp()
    if how.kind == "vp":
        return vp_sigma(1 + level * (how.epsilon_t - 1), beta_d=how.beta_d, beta_min=how.beta_min)
    return how.sigma_min * (how.sigma_max / how.sigma_min) ** level


def error_weight(how: Objective, sigma: Tensor) -> Tensor:
    """Weight of the squared error at a noise level."""
    if how.kind == "edm":
        return (sigma**2 + how.sigma_data**2) / (sigma * how.sigma_data) ** 2
    return 1 / sigma**2


def pixel_losses(
    how: Objective,
    model: nn.Module,
    images: Tensor,
    class_labels: Tensor | None,
    *,
    level: Tensor,
    noise: Tensor,
    augment_labels: Tensor | None = None,
) -> Tensor:
    """weight (D(images + sigma noise; sigma) - images)^2, unreduced: (B, C, R, R).

    images, noise: (B, C, R, R), images in [-1, 1]. level: (B, 1, 1, 1), see `noise_level`.
    class_labels: (B, label_dim) one-hot, zero rows for the null class. augment_labels: see edm/augment.py.
    """
    sigma = noise_level(how, level)
    denoised = model(images + noise * sigma, sigma, class_labels, augment_labels=augment_labels)
    return error_weight(how, sigma) * (denoised - images) ** 2
