"""Streaming mean and covariance of features: O(dim^2) memory for any number of images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fid.frechet import Gaussian


class Moments:
    """Count, mean and unbiased covariance of feature vectors, in float64.

    Kept as count n, mean and scatter = sum (x - mean)(x - mean)^T; batches are merged by Chan's update (Chan, Golub,
    LeVeque 1979), which never subtracts two large sums. So the result agrees to 1e-10 relative for every split into
    batches, ranks and machines, also when the mean is hundreds of standard deviations from zero.

    The state lives on the device of the first batch, or on the CPU if that device has no float64.
    """

    def __init__(self, dim: int):
        self.dim = dim
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features (B, dim), B >= 0. Raises ValueError if they have another shape or are not finite."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"expected features (B, {self.dim}), got {tuple(features.shape)}")
        if len(features) == 0:
            return
        if not torch.isfinite(features).all():
            bad = int((~torch.isfinite(features).all(1)).sum())
            raise ValueError(
                f"{bad} of {len(features)} feature vectors are not finite: the images or the feature network are broken"
            )
        if self.count == 0:
            device = torch.device("cpu") if features.device.type == "mps" else features.device  # MPS has no float64
            self._mean, self._scatter = self._mean.to(device), self._scatter.to(device)
        x = features.to(self._mean.device).double()
        mean = x.mean(0)
        centred = x - mean
        self._merge(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add the images of `other`."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge moments of {other.dim} features into moments of {self.dim}")
        if other.count:
            self._merge(other.count, other._mean.to(self._mean.device), other._scatter.to(self._mean.device))

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        delta = mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(delta, delta, alpha=self.count * count / total)
        self._mean += delta * (count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(dim,) float64. Raises ValueError before the first image."""
        if self.count < 1:
            raise ValueError("no images yet: a mean needs at least 1")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """(dim, dim) float64, unbiased (n - 1). Raises ValueError for fewer than 2 images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self._scatter / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """Mean and covariance on the CPU, as `frechet_distance` takes them."""
        return Gaussian(self.mean.cpu(), self.covariance.cpu(), self.count)

    def tensors(self) -> dict[str, Tensor]:
        """Sums that add over disjoint sets of images: sum them over ranks (all-reduce), or save them and go on later.

        count: (1,), sum: (dim,) = sum of x, second: (dim, dim) = sum of x x^T, all float64 (a count is exact up to
        2^53). Going through raw sums costs one rounding: a relative error of about 1e-16 (1 + mean^2 / variance).
        """
        count = torch.tensor([self.count], dtype=torch.float64, device=self._mean.device)
        second = torch.addr(self._scatter, self._mean, self._mean, alpha=self.count)
        return {"count": count, "sum": self._mean * self.count, "second": second}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """The moments whose `tensors()` these are, or whose sum over ranks these are."""
        missing = {"count", "sum", "second"} - set(tensors)
        if missing:
            raise ValueError(f"moments need the tensors count, sum and second; {', '.join(sorted(missing))} missing")
        moments = cls(len(tensors["sum"]))
        moments.count = round(float(tensors["count"].reshape(())))
        if moments.count:
            moments._mean = tensors["sum"].double() / moments.count
            moments._scatter = torch.addr(
                tensors["second"].double(), moments._mean, moments._mean, alpha=-moments.count
            )
        return moments

    def state(self) -> dict[str, Tensor]:
        """The exact state, to save and go on later bit for bit (`tensors()` are rounded sums)."""
        return {"count": torch.tensor([self.count]), "mean": self._mean, "scatter": self._scatter}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Moments:
        """The moments whose `state()` this is."""
        moments = cls(len(state["mean"]))
        moments.count = int(state["count"])
        moments._mean, moments._scatter = state["mean"].clone(), state["scatter"].clone()
        return moments
