"""The truth of the toy: one two-dimensional Gaussian, and how far samples are from it."""

# R replicas, N points

from __future__ import annotations

import torch
from torch import Tensor

from fid.frechet import Gaussian, frechet_distance

COVARIANCE = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
"""Covariance of the target; its mean is 0. Variance 3 along the diagonal, 1 across it."""

TRUTH = Gaussian(torch.zeros(2), COVARIANCE)


def real_points(num_replicas: int, num_points: int, *, seed: int) -> Tensor:
    """Fresh draws of the target, (R, N, 2) float32, independent in every replica."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_replicas, num_points, 2, generator=generator)
    return noise @ torch.linalg.cholesky(COVARIANCE).T.float()


def density(points: Tensor) -> Tensor:
    """The target's density at points (..., 2)."""
    mahalanobis = (points.double() @ torch.linalg.inv(COVARIANCE) * points).sum(-1)
    return torch.exp(-mahalanobis / 2) / (2 * torch.pi * torch.linalg.det(COVARIANCE).sqrt())


def moments(points_RN2: Tensor) -> list[Gaussian]:
    """Mean and covariance of every replica's points."""
    return [Gaussian(points.mean(0), torch.cov(points.T)) for points in points_RN2.double()]


def distance(points_RN2: Tensor) -> Tensor:
    """The Frechet distance to the target of every replica's points, (R,) float64, from their exact mean and covariance.

    It is FID with the coordinates themselves as features. Finite samples add about 5 / N.
    """
    return torch.tensor([frechet_distance(generated=gaussian, reference=TRUTH) for gaussian in moments(points_RN2)], dtype=torch.float64)
