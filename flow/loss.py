"""Flow matching: regress the velocity of a path from noise x0 at t = 0 to an image x1 at t = 1.

Lipman et al. 2023 (arXiv 2210.02747), Tong et al. 2024 (arXiv 2302.00482, table 1), Albergo and Vanden-Eijnden 2023
(arXiv 2209.15571).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flow.coupling import assigned, exact_plan, sampled_pairs, sinkhorn_plan, transport_cost
from flow.options import Objective


def pairs(how: Objective, noise: Tensor, images: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices (B,), (B,) of the noises and images that go together. uniform: (B,) float64, if they are drawn."""
    cost = transport_cost(noise, images)
    if uniform is None:
        return torch.argsort(assigned(cost)), torch.arange(len(images))
    plan = sinkhorn_plan(cost, 2 * how.sigma**2) if how.pairing == "sinkhorn" else exact_plan(cost)
    return sampled_pairs(plan, uniform)


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
