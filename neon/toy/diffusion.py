"""A diffusion model of points in the plane: 4,418 parameters, cosine schedule, deterministic DDIM."""

# R replicas, N points

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from neon.toy.stack import Weights, dense, fresh_layers
from neon.toy.target import COVARIANCE

OFFSET = 0.008
LAST_TIME = 0.98
"""Training and sampling stop here: at time 1 no signal is left, and the estimate of x_0 would divide by zero."""


def signal(time: Tensor) -> Tensor:
    """alpha_bar, the share of x_t's variance that is signal, at a time in [0, 1].

    Nichol and Dhariwal 2021 (arXiv 2102.09672), equation 17.
    """
    start = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2)
    return (torch.cos((time + OFFSET) / (1 + OFFSET) * math.pi / 2) / start).square()


def ddim_step(x: Tensor, noise: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor) -> Tensor:
    """x at the next time, given the predicted noise. Song et al. 2021 (arXiv 2010.02502), equation 12 with sigma =
    0."""
    x0 = (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
    return alpha_bar_next.sqrt() * x0 + (1 - alpha_bar_next).sqrt() * noise


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """Predicts the noise in x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise from x_t and the time.

    The sampler's knob is zeta, a factor on the score: zeta > 1 is mode-seeking, zeta < 1 diversity-seeking.
    """

    num_steps: int = 8
    ordinary: float = 1.0
    """zeta of the sampler that the model is used and scored with."""
    knob: str = "zeta"

    def fresh(self, num_replicas: int, generator: torch.Generator) -> Weights:
        return fresh_layers([3, 32, 32, 32, 32, 32, 2], num_replicas, generator)

    def predict_noise(self, weights: Weights, x_RN2: Tensor, time: Tensor) -> Tensor:
        """time: in [0, 1], any shape that broadcasts to (R, N, 1)."""
        h = dense(
            weights, 0, torch.cat([x_RN2, time.expand(*x_RN2.shape[:-1], 1)], dim=-1)
        )  # linear, as in the authors' net
        for layer in range(1, 5):
            h = dense(weights, layer, h).relu_()
        return dense(weights, 5, h)

    def loss(self, weights: Weights, x_RN2: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the predicted noise, (R,)."""
        time = LAST_TIME * torch.rand(*x_RN2.shape[:-1], 1, generator=generator)
        noise = torch.randn(x_RN2.shape, generator=generator)
        alpha_bar = signal(time)
        noisy = alpha_bar.sqrt() * x_RN2 + (1 - alpha_bar).sqrt() * noise
        return (self.predict_noise(weights, noisy, time) - noise).square().mean(dim=(1, 2))

    def sample(self, weights: Weights, noise_RN2: Tensor, zeta: float | None = None) -> Tensor:
        """Points (R, N, 2) from standard normal noise; zeta None is the ordinary sampler."""
        zeta = self.ordinary if zeta is None else zeta
        x = noise_RN2
        for time, time_next in pairwise(torch.linspace(LAST_TIME, 0, self.num_steps + 1, dtype=x.dtype)):
            x = ddim_step(x, zeta * self.predict_noise(weights, x, time), signal(time), signal(time_next))
        return x


@dataclass(frozen=True, kw_only=True)
class ExactDiffusion(Diffusion):
    """The same sampler with the target's exact score: what is left is the solver's error alone."""

    def predict_noise(self, weights: Weights, x_RN2: Tensor, time: Tensor) -> Tensor:
        """-sqrt(1 - alpha_bar) times the score of N(0, alpha_bar Sigma + (1 - alpha_bar) I), for one time."""
        alpha_bar = signal(time.double())
        covariance = alpha_bar * COVARIANCE + (1 - alpha_bar) * torch.eye(2, dtype=torch.float64)
        return x_RN2 @ ((1 - alpha_bar).sqrt() * torch.linalg.inv(covariance)).to(x_RN2.dtype)
