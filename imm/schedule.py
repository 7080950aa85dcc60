"""The two noise schedules of IMM: x_t = alpha(t) x + sigma(t) noise, t in [0, 1].

Zhou et al. 2025 (arXiv 2503.07565), sections 2 and 4. nt = sigma / alpha is the noise level that grids and gaps are
stated in. Functions keep the dtype of t; those marked float64 compute in float64 and cast back, because log(1 - t)
loses most digits in float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Schedule(ABC):
    """alpha and sigma of a diffusion between data (t = 0) and noise (t = 1). t: any shape, values in [0, 1]."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """How much of the data is left."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """How much noise there is, in units of sigma_data."""

    @abstractmethod
    def logsnr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2). float64 inside."""

    @abstractmethod
    def logsnr_slope(self, t: Tensor) -> Tensor:
        """The derivative of logsnr(t)."""

    @abstractmethod
    def t_of_nt(self, nt: Tensor) -> Tensor:
        """The inverse of nt(t) = sigma / alpha; infinity goes to 1. float64 inside."""

    def log_nt(self, t: Tensor) -> Tensor:
        """log(sigma / alpha)."""
        return -0.5 * self.logsnr(t)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha(t) clean + sigma(t) noise, where noise has the standard deviation sigma_data."""
        return self.alpha(t) * clean + self.sigma(t) * noise

    def ddim(self, noisy: Tensor, clean: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The point at s on the line through `noisy` (at t) and an estimate of the clean data; eq. 9 of the paper."""
        ratio = self.sigma(s) / self.sigma(t)
        return (self.alpha(s) - self.alpha(t) * ratio) * clean + ratio * noisy


class FlowMatching(Schedule):
    """alpha = 1 - t, sigma = t."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def logsnr(self, t: Tensor) -> Tensor:
        t64 = t.double()
        return (2 * ((1 - t64).log() - t64.log())).to(t.dtype)

    def logsnr_slope(self, t: Tensor) -> Tensor:
        return -2 / ((1 - t) * t)

    def t_of_nt(self, nt: Tensor) -> Tensor:
        nt64 = nt.double()
        return torch.nan_to_num(nt64 / (1 + nt64), nan=1.0).to(nt.dtype)


class VPCosine(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * math.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * math.pi / 2)

    def logsnr(self, t: Tensor) -> Tensor:
        return (-2 * torch.tan(t.double() * math.pi / 2).log()).to(t.dtype)

    def logsnr_slope(self, t: Tensor) -> Tensor:
        return -math.pi / (self.sigma(t) * self.alpha(t))

    def t_of_nt(self, nt: Tensor) -> Tensor:
        return (torch.atan(nt.double()) / (math.pi / 2)).to(nt.dtype)


SCHEDULES: dict[str, Schedule] = {"fm": FlowMatching(), "vp_cosine": VPCosine()}
