"""The truth of the toy: one two-dimensional Gaussian, and how far samples are from it."""

# R replicas, N points

from __future__ import annotations

import torch
from torch import Tensor

COVARIANCE = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
"""Covariance of the target; its mean is 0. Variance 3 along the diagonal, 1 across it."""


def real_points(num_replicas: int, num_points: int, *, seed: int) -> Tensor:
    """Fresh draws of the target, (R, N, 2) float32, independent in every replica."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_replicas, num_points, 2, generator=generator)
    return noise @ torch.linalg.cholesky(COVARIANCE).T.float()


def density(points: Tensor) -> Tensor:
    """The target's density at points (..., 2)."""
    mahalanobis = (points.double() @ torch.linalg.inv(COVARIANCE) * points).sum(-1)
    return torch.exp(-mahalanobis / 2) / (2 * torch.pi * torch.linalg.det(COVARIANCE).sqrt())


def distance(points_RN2: Tensor) -> Tensor:
    """The Frechet distance to the target of every replica's points, (R,) float64, from their exact mean and covariance.

    It is FID with the coordinates themselves as features: |m|^2 + tr(S + T - 2 sqrt(S T)). In the plane the last trace
    has a closed form, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), and so a gradient. Finite samples add about 5 / N.
    """
    points = points_RN2.double()
    mean = points.mean(dim=1, keepdim=True)
    covariance = (points - mean).mT @ (points - mean) / (points.shape[1] - 1)
    product = covariance @ COVARIANCE
    return (
        mean.square().sum((1, 2))
        + trace(covariance)
        + COVARIANCE.trace()
        - 2 * (trace(product) + 2 * product.det().sqrt()).sqrt()
    )


def trace(matrices_R22: Tensor) -> Tensor:
    return matrices_R22.diagonal(dim1=1, dim2=2).sum(1)
