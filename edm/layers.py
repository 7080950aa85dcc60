"""The layers of the EDM U-Nets (arXiv 2206.00364, appendix C). Attribute names are the published state-dict keys.

Parameters may be of a higher precision than the activations: they are cast to the input's dtype at every call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Init:
    """How a layer is initialised: a distribution of unit gain times `weight`; biases by the same rule times `bias`."""

    mode: Literal["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"]
    weight: float = 1.0
    bias: float = 0.0

    def draw(self, shape: Sequence[int], fan_in: int, fan_out: int) -> Tensor:
        """Unit-gain values from torch's global generator."""
        variance = 1 / fan_in if self.mode.startswith("kaiming") else 2 / (fan_in + fan_out)
        if self.mode.endswith("uniform"):
            return math.sqrt(3 * variance) * (torch.rand(*shape) * 2 - 1)
        return math.sqrt(variance) * torch.randn(*shape)


class Linear(nn.Module):
    """y = x W^T + b."""

    def __init__(self, in_features: int, out_features: int, *, init: Init, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(init.draw((out_features, in_features), in_features, out_features) * init.weight)
        self.bias = nn.Parameter(init.draw((out_features,), in_features, out_features) * init.bias) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Convolution with optional 2x resampling before it; kernel 0 resamples only and has no parameters.

    resample_filter: taps of the separable low-pass filter; [1, 1] is nearest-neighbour up and the 2x2 mean down.
    fused_down: convolve first, then filter and stride (the residual path of NCSN++).
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        init: Init,
        resample: Literal["up", "down", "fused_down"] | None = None,
        resample_filter: Sequence[int] = (1, 1),
    ):
        super().__init__()
        self.out_channels = out_channels
        self.padding = kernel // 2
        self.resample = resample
        self.has_box_filter = tuple(resample_filter) == (1, 1)
        self.weight = self.bias = None
        if kernel:
            fan_in, fan_out = in_channels * kernel**2, out_channels * kernel**2
            self.weight = nn.Parameter(
                init.draw((out_channels, in_channels, kernel, kernel), fan_in, fan_out) * init.weight
            )
            self.bias = nn.Parameter(init.draw((out_channels,), fan_in, fan_out) * init.bias)
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        self.filter_padding = (len(taps) - 1) // 2
        self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None] if resample else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.resample == "fused_down":
            # the bias commutes with the filter, whose taps sum to one: nothing is padded between the two
            return self.filter_down(self.convolve(x, self.padding + self.filter_padding), padding=0)
        if self.resample == "up":
            x = self.filter_up(x)
        elif self.resample == "down":
            x = self.filter_down(x, padding=self.filter_padding)
        return self.convolve(x, self.padding)

    def convolve(self, x: Tensor, padding: int) -> Tensor:
        if self.weight is None or self.bias is None:
            return x
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=padding)

    def filter_up(self, x: Tensor) -> Tensor:
        if self.has_box_filter:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv_transpose2d(x, self.depthwise(x) * 4, groups=x.shape[1], stride=2, padding=self.filter_padding)

    def filter_down(self, x: Tensor, padding: int) -> Tensor:
        if self.has_box_filter:
            return F.avg_pool2d(x, 2)
        return F.conv2d(x, self.depthwise(x), groups=x.shape[1], stride=2, padding=padding)

    def depthwise(self, x: Tensor) -> Tensor:
        return self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)


class GroupNorm(nn.Module):
    """Group normalisation with min(32, C / 4) groups as published, or the next smaller number that divides C."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        largest = max(min(32, channels // 4), 1)
        self.num_groups = next(groups for groups in range(largest, 0, -1) if channels % groups == 0)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


@dataclass(frozen=True, kw_only=True)
class BlockStyle:
    """What distinguishes the blocks of one U-Net family from another's."""

    emb_channels: int
    dropout: float
    eps: float
    init: Init
    init_out: Init
    """Of the last layer of the residual and of the attention branch."""
    init_qkv: Init
    skip_scale: float = 1.0
    resample_filter: tuple[int, ...] = (1, 1)
    projects_resampled: bool
    """Whether the skip path of an up- or downsampling block has a 1x1 convolution even at equal channels."""
    adaptive_scale: bool
    """Whether the embedding scales and shifts the second norm's output instead of being added to its input."""
    channels_per_head: int | None
    """None: one head."""

    def num_heads(self, channels: int) -> int:
        """0 when a head is wider than the layer: the published networks then have no attention there."""
        return 1 if self.channels_per_head is None else channels // self.channels_per_head


class UNetBlock(nn.Module):
    """Residual block conditioned on an embedding, optionally resampling, optionally followed by self-attention.

    forward: x (B, in_channels, H, W), emb (B or 1, emb_channels) -> (B, out_channels, H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        resample: Literal["up", "down"] | None = None,
        attention: bool = False,
    ):
        super().__init__()
        self.style = style
        self.out_channels = out_channels
        self.num_heads = style.num_heads(out_channels) if attention else 0
        affine_channels = out_channels * (2 if style.adaptive_scale else 1)
        taps = style.resample_filter

        self.norm0 = GroupNorm(in_channels, style.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, init=style.init, resample=resample, resample_filter=taps)
        self.affine = Linear(style.emb_channels, affine_channels, init=style.init)
        self.norm1 = GroupNorm(out_channels, style.eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=style.init_out)
        self.skip = None
        if resample or in_channels != out_channels:
            kernel = 1 if style.projects_resampled or in_channels != out_channels else 0
            self.skip = Conv2d(
                in_channels, out_channels, kernel, init=style.init, resample=resample, resample_filter=taps
            )
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, style.eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, init=style.init_qkv)
            self.proj = Conv2d(out_channels, out_channels, 1, init=style.init_out)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        condition = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.style.adaptive_scale:
            scale, shift = condition.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + condition))
        h = self.conv1(F.dropout(h, self.style.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.style.skip_scale
        if self.num_heads:
            # x comes first: the sum then has x's memory layout, on which seeded dropout masks depend
            x = (x + self.proj(self.attend(self.qkv(self.norm2(x))))) * self.style.skip_scale
        return x

    def attend(self, qkv: Tensor) -> Tensor:
        """(B, 3 C, H, W) -> (B, C, H, W); channel 3 c + j of a head is its channel c of query, key, value j."""
        B, _, H, W = qkv.shape
        split = qkv.reshape(B, self.num_heads, self.out_channels // self.num_heads, 3, H * W)
        # each (B, heads, H W, C / heads), contiguous for the fast kernels
        q, k, v = split.permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(B, self.out_channels, H, W)


class PositionalEmbedding(nn.Module):
    """Scalars (B,) -> (B, channels): [cos(c f), sin(c f)], f from 1 down to 1e-4 (reached if `endpoint`)."""

    def __init__(self, channels: int, *, endpoint: bool):
        super().__init__()
        self.channels = channels
        self.endpoint = endpoint

    def forward(self, c: Tensor) -> Tensor:
        half = self.channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=c.device) / (half - int(self.endpoint))
        angles = c.outer(((1 / 10000) ** exponents).to(c.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Scalars (B,) -> (B, channels): [cos(2 pi f c), sin(2 pi f c)], f random and fixed."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, c: Tensor) -> Tensor:
        angles = c.outer((2 * math.pi * self.freqs).to(c.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)
