"""Deterministic and stochastic sampling with Heun's method (Karras et al. 2022, arXiv 2206.00364, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x (B, *), sigma ()) -> expected clean image (B, *)."""


@dataclass(frozen=True, kw_only=True)
class Churn:
    """Noise that the stochastic sampler adds and removes again in every step. S_churn = 0 is the deterministic
    sampler."""

    S_churn: float = 0.0
    """Total amount over all steps."""
    S_min: float = 0.0
    S_max: float = math.inf
    """Noise levels in between are churned."""
    S_noise: float = 1.0
    """Standard deviation of the added noise."""

    def gamma(self, sigma: float, num_steps: int) -> float:
        """Relative increase of the noise level in the step that starts at sigma."""
        return min(self.S_churn / num_steps, math.sqrt(2) - 1) if self.S_min <= sigma <= self.S_max else 0.0


def noise_levels(
    num_steps: int, *, sigma_min: float, sigma_max: float, rho: float, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Equation 5: (num_steps,) levels from sigma_max down to sigma_min, equidistant in sigma^(1 / rho)."""
    if num_steps < 2:
        raise ValueError(f"num_steps must be >= 2, got {num_steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"noise levels need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    index = torch.arange(num_steps, dtype=dtype)
    return (sigma_max ** (1 / rho) + index / (num_steps - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


@torch.no_grad()
def sample_heun(
    denoise: Denoiser,
    latents: Tensor,
    sigmas: Tensor,
    *,
    churn: Churn = Churn(),
    noise: Callable[[float], Tensor] | None = None,
    round_sigma: Callable[[Tensor], Tensor] = lambda sigma: sigma,
) -> Tensor:
    """Integrate dx/dsigma = (x - D(x, sigma)) / sigma from sigmas[0] to 0.

    latents: (B, *) unit normal; scaled here by sigmas[0].
    sigmas: (N,) strictly decreasing and positive, in data units (pixels in [-1, 1]); 0 follows.
    noise: gives (B, *) unit normals for the step that starts at a level. Called once per step if S_churn > 0, also in
        steps outside S_min .. S_max, so that the noise of a step does not depend on these two.
    Returns (B, *) in the dtype of `sigmas`; float64 for published numbers. 2 N - 1 calls of D.
    """
    levels = [*sigmas.cpu().tolist(), 0.0]  # read once: no later step waits for the GPU
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).to(latents.device)
    x = latents.to(sigmas.dtype) * sigmas[0]
    for i, level in enumerate(levels[:-1]):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        if churn.S_churn > 0:
            if noise is None:
                raise ValueError("S_churn > 0 needs a source of noise")
            fresh, gamma = noise(level), churn.gamma(level, len(levels) - 1)
            sigma_hat = round_sigma(sigma + gamma * sigma)
            x = x + (sigma_hat**2 - sigma**2).sqrt() * churn.S_noise * fresh
            sigma = sigma_hat
        slope = (x - denoise(x, sigma).to(x.dtype)) / sigma
        x_euler = x + (sigma_next - sigma) * slope
        if levels[i + 1] == 0:  # slope is undefined at sigma = 0
            x = x_euler
        else:
            slope_next = (x_euler - denoise(x_euler, sigma_next).to(x.dtype)) / sigma_next
            x = x + (sigma_next - sigma) * (0.5 * slope + 0.5 * slope_next)
    return x
