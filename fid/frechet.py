"""The Frechet distance between two Gaussians, real by construction and without a matrix root."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.linalg import lapack
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gaussian:
    """mean (D,) and covariance (D, D), symmetric and positive semi-definite up to rounding; kept in float64 on the CPU.

    count: number of samples behind them if known; fewer than D + 1 leave a singular covariance of rank count - 1.
    Raises ValueError if the shapes do not fit, a value is not finite or the covariance is not symmetric.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    def __post_init__(self) -> None:
        mean, covariance = self.mean.detach().cpu().double(), self.covariance.detach().cpu().double()
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"expected mean (D,) and covariance (D, D), got {tuple(mean.shape)} and {tuple(covariance.shape)}"
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise ValueError("mean or covariance contains NaN or infinity")
        if (covariance - covariance.T).abs().max() > 1e-5 * covariance.abs().max():
            raise ValueError("the covariance is not symmetric")
        if len(mean) and covariance.diagonal().min() < -1e-6 * covariance.abs().max():
            raise ValueError(f"the covariance has a negative variance ({covariance.diagonal().min():.3g})")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", (covariance + covariance.T) / 2)

    def check_semidefinite(self) -> None:
        """Raise ValueError if a variance is negative in some direction by more than rounding can explain (1e-4 of the
        largest variance; float32 files are off by 1e-6). Costs one Cholesky factor."""
        shift = 1e-4 * self.covariance.diagonal().max()
        if shift <= 0:  # all variances are zero: then so must be the rest
            is_negative = bool(self.covariance.any())
        else:
            shifted = self.covariance + shift * torch.eye(len(self.mean), dtype=torch.float64)
            is_negative = bool(torch.linalg.cholesky_ex(shifted).info)
        if is_negative:
            raise ValueError("the covariance is not positive semi-definite: it is none of any set of samples")

    @cached_property
    def factor(self) -> tuple[Tensor, Tensor]:
        """(U, order): covariance[order][:, order] = U^T U with U (R, D) upper trapezoidal, R the numerical rank.
        Computed once.

        Where rounding has left negative eigenvalues (a float32 file), of the nearest positive semi-definite matrix.
        """
        upper, order = _pivoted_cholesky(self.covariance)
        missed = (self.covariance.trace() - upper.square().sum()).abs()
        if missed > len(self.mean) ** 2 * torch.finfo(torch.float64).eps * self.covariance.diagonal().max():
            values, vectors = torch.linalg.eigh(self.covariance)
            return _pivoted_cholesky((vectors * values.clamp(min=0)) @ vectors.T)
        return upper, order


def _pivoted_cholesky(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """(U, order) with rows of U that fall in length; ends at pivots that are rounding errors: below D * eps * the
    largest variance."""
    packed, order, rank, _ = lapack.dpstrf(covariance.numpy().T, lower=1)
    return torch.from_numpy(packed.T).triu()[:rank], torch.from_numpy(order).long() - 1


def frechet_distance(*, generated: Gaussian, reference: Gaussian) -> float:
    """|mu_g - mu_r|^2 + tr S_g + tr S_r - 2 tr (S_g S_r)^(1/2)  (Dowson and Landau 1982; FID: Heusel et al. 2017).

    With S_r = U^T U, the trace of the root is the sum of sqrt(eigenvalues of U S_g U^T), a symmetric matrix: real
    whatever the rank, and never negative after clipping. The rows of U fall in length, so the matrix is graded and its
    small eigenvalues keep their digits: the distance of a Gaussian to itself is 0 within 1e-12 of its trace, also for
    singular covariances. If either side has fewer samples than dimensions, the one with fewer is factored: its R x R
    matrix is smaller, and has no zero eigenvalues whose rounding errors the root would blow up.

    The factor is computed once per `Gaussian` object and reused. Raises ValueError if the dimensions differ.
    """
    if len(generated.mean) != len(reference.mean):
        raise ValueError(
            f"generated statistics have {len(generated.mean)} features, the reference {len(reference.mean)}: other "
            "extractors"
        )
    factored, other = reference, generated
    if (generated.count or math.inf) < min(reference.count or math.inf, len(generated.mean)):
        factored, other = generated, reference
    upper, order = factored.factor
    form = _lower_form(upper, other.covariance[order[:, None], order])
    root_trace = torch.linalg.eigvalsh(form).clamp(min=0).sqrt().sum()
    offset = (generated.mean - reference.mean).square().sum()
    distance = offset + generated.covariance.trace() + reference.covariance.trace() - 2 * root_trace
    return max(distance.item(), 0.0)


def _lower_form(upper: Tensor, covariance: Tensor, block: int = 256) -> Tensor:
    """The lower triangle of U S U^T, which is all that a symmetric eigenvalue routine reads; zeros of U are not
    multiplied."""
    rank = len(upper)
    left = torch.empty_like(upper)
    form = torch.zeros(rank, rank, dtype=torch.float64)
    for i in range(0, rank, block):
        rows = slice(i, i + block)
        torch.mm(upper[rows, i:], covariance[i:], out=left[rows])
        torch.mm(upper[rows, i:], left[: i + block, i:].T, out=form[rows, : i + block])
    return form
