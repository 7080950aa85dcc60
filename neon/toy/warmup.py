"""Neon in closed form: a D-dimensional Gaussian, fitted by maximum likelihood to n points of N(0, I).

The fit's own samples, drawn with temperature tau, have covariance tau^2 S (S the fitted covariance). One gradient step
on them moves S along -S^-1 and leaves the mean alone, so the merge is S + a S^-1 with a = w * lr * (1 - tau^2) / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """dimension D and number of points n > D + 6, so that third inverse moments of the fit exist."""

    dimension: int = 10
    num_points: int = 100

    def __post_init__(self) -> None:
        if self.num_points <= self.dimension + 6:
            raise ValueError(
                f"the closed forms need num_points > dimension + 6 = {self.dimension + 6}, got {self.num_points}"
            )

    def fits(self, num_fits: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """Maximum-likelihood fits to independent data sets: means (F, D) and covariances (F, D, D), float64."""
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(num_fits, self.num_points, self.dimension, generator=generator, dtype=torch.float64)
        mean = points.mean(dim=1)
        centred = points - mean[:, None]
        return mean, centred.mT @ centred / self.num_points

    def excess_nll(self, mean: Tensor, covariance: Tensor, a: Tensor) -> Tensor:
        """KL(N(0, I) | N(mean, S + a S^-1)) in nats: how much worse than the truth the merged fit predicts. (A, F) for
        a (A,)."""
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        offsets = (vectors.mT @ mean[..., None]).squeeze(-1).square()  # of the mean, along the eigenvectors
        merged = eigenvalues + a[:, None, None] / eigenvalues
        return 0.5 * (merged.log() + (1 + offsets) / merged - 1).sum(-1)

    def slope(self) -> float:
        """The expected derivative of `excess_nll` in a at a = 0, exactly: (E tr S^-2 - (1 + 1/n) E tr S^-3) / 2.

        Inverse moments of a Wishart matrix with n - 1 degrees of freedom by Haff's identity (1979), with q = n - D - 2.
        """
        D, n = self.dimension, self.num_points
        q = n - D - 2
        second = D * (q + D) / (q * (q - 2) * (q + 1))
        third = second * (q + 2 * D) / ((q - 4) * (q + 2))
        return 0.5 * (n**2 * second - (1 + 1 / n) * n**3 * third)

    def sandwich(self) -> float:
        """E[S^-1 Sigma S^-1] = sandwich * Sigma^-1 for points of N(., Sigma): n^2 (n-2) / ((n-D-1)(n-D-2)(n-D-4))."""
        D, n = self.dimension, self.num_points
        return n**2 * (n - 2) / ((n - D - 1) * (n - D - 2) * (n - D - 4))

    def published_sandwich(self) -> float:
        """What the paper's appendix B.1 uses in its place, n^2 / ((n-D-2)(n-D-4)); the two agree for D = 1 only."""
        D, n = self.dimension, self.num_points
        return n**2 / ((n - D - 2) * (n - D - 4))
