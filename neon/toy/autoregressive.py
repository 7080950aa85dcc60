"""An autoregressive model of points in the plane: p(x1) p(x2 | x1), both Gaussian, exact likelihood, 4,482
parameters."""

# R replicas, N points

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neon.toy.stack import Weights, dense, fresh_layers

LOG_STD_RANGE = (-6.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """One network gives both conditionals, from (start flag, x1): (1, 0) asks for p(x1), (0, x1) for p(x2 | x1).

    The sampler's knob is the temperature tau, a factor on both standard deviations: tau < 1 is mode-seeking, tau > 1
    diversity-seeking.
    """

    ordinary: float = 0.85
    """tau of the sampler that the model is used and scored with."""
    knob: str = "tau"

    def fresh(self, num_replicas: int, generator: torch.Generator) -> Weights:
        return fresh_layers([2, 64, 64, 2], num_replicas, generator)

    def conditional(self, weights: Weights, prefix_RN2: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, each (R, N, 1), of the coordinate that follows the prefix (start flag,
        x1)."""
        h = dense(weights, 0, prefix_RN2).relu_()
        h = dense(weights, 1, h).relu_()
        mean, log_std = dense(weights, 2, h).chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD_RANGE)

    def log_density(self, weights: Weights, x_RN2: Tensor) -> Tensor:
        """(R, N), at temperature 1."""
        x1, x2 = x_RN2.chunk(2, dim=-1)
        first = normal_log_density(x1, *self.conditional(weights, start(x1[:, :1])))
        return (first + normal_log_density(x2, *self.conditional(weights, after(x1)))).squeeze(-1)

    def loss(self, weights: Weights, x_RN2: Tensor, generator: torch.Generator) -> Tensor:
        """Mean negative log-likelihood, (R,). Exact: nothing is drawn."""
        return -self.log_density(weights, x_RN2).mean(-1)

    def sample(self, weights: Weights, noise_RN2: Tensor, tau: float | None = None) -> Tensor:
        """Points (R, N, 2) from standard normal noise; tau None is the ordinary sampler."""
        tau = self.ordinary if tau is None else tau
        z1, z2 = noise_RN2.chunk(2, dim=-1)
        mean, log_std = self.conditional(weights, start(z1[:, :1]))
        x1 = mean + tau * log_std.exp() * z1
        mean, log_std = self.conditional(weights, after(x1))
        return torch.cat([x1, mean + tau * log_std.exp() * z2], dim=-1)


def start(like_R11: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(like_R11), torch.zeros_like(like_R11)], dim=-1)


def after(x1_RN1: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x1_RN1), x1_RN1], dim=-1)


def normal_log_density(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    return -0.5 * ((x - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2 * math.pi)
