"""Multi-scale residual vector quantisation: every scale encodes what the coarser scales have left over.

Tian et al. 2024 (arXiv 2404.02905), Algorithms 1 and 2. Attribute names are those of the published state dict. Scale k
is a map of patch_nums[k] x patch_nums[k] tokens; the last one has the size of the latent. Nothing is updated in place.
"""

# B batch, Z latent channels, V vocabulary, HW latent side, l tokens of one scale = patch_nums[k] ** 2, L of all scales

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def phi_index(scale: int, num_scales: int, num_phis: int) -> int:
    """Which of the `num_phis` convolutions serves `scale` out of `num_scales`: the nearest tick to scale / (num_scales
    - 1).

    numpy.linspace in float64 is part of the definition: with the published 10 scales and 4 convolutions, two scales lie
    exactly between two ticks and only its rounding gives the published table [0, 0, 1, 1, 1, 2, 2, 3, 3, 3].
    """
    margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
    ticks = np.linspace(margin, 1 - margin, num_phis)
    return int(np.argmin(np.abs(ticks - scale / (num_scales - 1))))


class Phi(nn.Conv2d):
    """(1 - ratio) h + ratio conv(h): repairs what was lost in upsampling a coarse scale."""

    def __init__(self, channels: int, ratio: float):
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + super().forward(h) * self.ratio


class SharedPhi(nn.Module):
    """One convolution for all scales."""

    def __init__(self, qresi: nn.Module):
        super().__init__()
        self.qresi = qresi

    def at(self, scale: int, num_scales: int) -> nn.Module:
        return self.qresi


class PartiallySharedPhi(nn.Module):
    """A few convolutions, each serving neighbouring scales."""

    def __init__(self, qresi_ls: Sequence[nn.Module]):
        super().__init__()
        self.qresi_ls = nn.ModuleList(qresi_ls)

    def at(self, scale: int, num_scales: int) -> nn.Module:
        return self.qresi_ls[phi_index(scale, num_scales, len(self.qresi_ls))]


class UnsharedPhi(nn.ModuleList):
    """One convolution for every scale."""

    def at(self, scale: int, num_scales: int) -> nn.Module:
        return self[phi_index(scale, num_scales, len(self))]


def phi_bank(
    channels: int, num_scales: int, *, ratio: float, share: int
) -> SharedPhi | PartiallySharedPhi | UnsharedPhi:
    """share: 0 = one convolution per scale, 1 = one for all, n = n convolutions. A ratio of 0 makes them identities."""

    def phi() -> nn.Module:
        return Phi(channels, abs(ratio)) if abs(ratio) > 1e-6 else nn.Identity()

    if share == 0:
        return UnsharedPhi(phi() for _ in range(num_scales))
    return SharedPhi(phi()) if share == 1 else PartiallySharedPhi([phi() for _ in range(share)])


class MultiScaleQuantizer(nn.Module):
    """Codebook, residual convolutions, and every conversion between features, indices, codes and the transformer's
    input.

    Tokens are (B, l, Z) and indices (B, l), row-major over a scale's map; features are (B, Z, HW, HW). Raises
    ValueError for fewer than two scales.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        z_channels: int,
        patch_nums: Sequence[int],
        is_cosine: bool = False,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
    ):
        super().__init__()
        if len(patch_nums) < 2:
            raise ValueError(f"a multi-scale quantiser needs at least two scales, patch_nums is {tuple(patch_nums)}")
        self.patch_nums = tuple(patch_nums)
        self.is_cosine = is_cosine
        # Bookkeeping of the published training: part of the file, without influence on any result.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(patch_nums), vocab_size))
        self.quant_resi = phi_bank(z_channels, len(patch_nums), ratio=quant_resi, share=share_quant_resi)
        self.embedding = nn.Embedding(vocab_size, z_channels)
        # far smaller than the features, so that every code starts near some of them
        nn.init.uniform_(self.embedding.weight, -1 / vocab_size, 1 / vocab_size)

    @property
    def num_scales(self) -> int:
        return len(self.patch_nums)

    def nearest(self, tokens: Tensor) -> Tensor:
        """Indices (N,) of the codes nearest to tokens (N, Z): by distance, or by cosine if `is_cosine`; the first one
        on ties.

        The distance is expanded, |z|^2 + |e|^2 - 2 z e, as published: another form rounds differently and moves
        indices.
        """
        codes = self.embedding.weight
        if self.is_cosine:
            return (F.normalize(tokens, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(1)
        squares = tokens.square().sum(1, keepdim=True) + codes.square().sum(1)
        return squares.addmm_(tokens, codes.T, alpha=-2).argmin(1)

    def embed(self, indices: Tensor) -> Tensor:
        """Indices (B, l) -> codebook vectors (B, l, Z)."""
        return self.embedding(indices)

    def add_scale(self, f_hat: Tensor, codes: Tensor, scale: int, patch_nums: Sequence[int] | None = None) -> Tensor:
        """f_hat (B, Z, HW, HW) plus what scale number `scale` adds to it, from its codes (B, l, Z)."""
        return f_hat + self._contribution(codes, scale, tuple(patch_nums or self.patch_nums))

    def input_of_scale(self, f_hat: Tensor, scale: int) -> Tensor:
        """What the transformer sees of f_hat (all scales before `scale`) when it predicts `scale`: (B, l, Z)."""
        return _as_tokens(_shrink(f_hat, self.patch_nums[scale]))

    def empty(self, batch: int) -> Tensor:
        """f_hat before the first scale: zeros (B, Z, HW, HW), float32."""
        weight = self.embedding.weight
        side = self.patch_nums[-1]
        return torch.zeros(batch, weight.shape[1], side, side, device=weight.device)

    def scales(self, f: Tensor, patch_nums: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Encode features f (B, Z, HW, HW), scale after scale: yields (indices (B, l), f_hat including this scale).

        patch_nums: other scales than the constructor's; the last one must be the side of f, else ValueError.
        """
        nums = self._checked(patch_nums, f)
        f_hat, rest = torch.zeros_like(f), f
        for scale, side in enumerate(nums):
            tokens = _as_tokens(_shrink(rest, side))
            indices = self.nearest(tokens.detach().flatten(0, 1)).view(tokens.shape[:2])
            step = self._contribution(self.embed(indices), scale, nums)
            f_hat = f_hat + step
            rest = rest - step.detach()
            yield indices, f_hat

    def indices_of(self, f: Tensor, patch_nums: Sequence[int] | None = None) -> list[Tensor]:
        """Features (B, Z, HW, HW) -> the indices (B, l) of every scale, int64."""
        return [indices for indices, _ in self.scales(f, patch_nums)]

    def features_of(self, indices: Sequence[Tensor]) -> Tensor:
        """The indices (B, l) of every scale -> f_hat (B, Z, HW, HW). The scales' sides are the square roots of l."""
        sides = [math.isqrt(index.shape[1]) for index in indices]
        f_hat = self.embedding.weight.new_zeros(indices[0].shape[0], self.embedding.embedding_dim, sides[-1], sides[-1])
        for scale, index in enumerate(indices):
            f_hat = self.add_scale(f_hat, self.embed(index), scale, sides)
        return f_hat

    def teacher_input(self, indices: Sequence[Tensor]) -> Tensor:
        """The transformer's training input (B, L - patch_nums[0] ** 2, Z) from the indices of all scales (the last is
        not used)."""
        f_hat = self.empty(indices[0].shape[0])
        inputs = []
        for scale, index in enumerate(indices[:-1]):
            f_hat = self.add_scale(f_hat, self.embed(index), scale)
            inputs.append(self.input_of_scale(f_hat, scale + 1))
        return torch.cat(inputs, dim=1)

    def _contribution(self, codes: Tensor, scale: int, nums: Sequence[int]) -> Tensor:
        h = codes.transpose(1, 2).unflatten(2, (nums[scale], nums[scale]))  # (B, Z, side, side)
        if scale != len(nums) - 1:
            h = F.interpolate(h, size=(nums[-1], nums[-1]), mode="bicubic")
        return self.quant_resi.at(scale, len(nums))(h)

    def _checked(self, patch_nums: Sequence[int] | None, f: Tensor) -> tuple[int, ...]:
        nums = tuple(patch_nums or self.patch_nums)
        if f.shape[2:] != (nums[-1], nums[-1]):
            raise ValueError(
                f"the last scale of patch_nums {nums} is {nums[-1]}, but the features are {f.shape[2]}x{f.shape[3]}: "
                "give images of the matching size or other patch_nums"
            )
        return nums


def _as_tokens(h: Tensor) -> Tensor:
    return h.flatten(2).transpose(1, 2)


def _shrink(f: Tensor, side: int) -> Tensor:
    return f if f.shape[-1] == side else F.adaptive_avg_pool2d(f, side)
