"""The U-Net of ADM (Dhariwal and Nichol 2021, arXiv 2105.05233) as TorchCFM uses it: a velocity v = net(t, x, y), time
first.

Attribute names are the published state-dict keys. N images, C channels, H, W pixels, E width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_GROUPS = 32
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
    28: (1, 2, 2),
}
"""Width of every level over num_channels, by the side of the image; used where the constructor names none."""
Resample = Literal["up", "down"]


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """(N,) times -> (N, channels): [cos(t f), sin(t f)], f falling geometrically from 1 towards 1e-4; odd widths end in
    a 0.

    t is not scaled: it lies in [0, 1], where most angles hardly change. The published networks were trained so.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, channels % 2))


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with zero weights. Its default initialisation has advanced the random stream, as in TorchCFM."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NUM_GROUPS, channels, eps=1e-5)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """(N, in_channels, H, W), (N, E) -> (N, out_channels, H', W'), at another resolution if `resample` says so."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        dropout: float,
        scales: bool,
        resample: Resample | None = None,
    ):
        super().__init__()
        self.resample = resample
        self.scales = scales
        self.in_layers = nn.Sequential(norm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels * (2 if scales else 1)))
        last = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.out_layers = nn.Sequential(norm(out_channels), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        first_norm, activation, first_conv = self.in_layers
        h = first_conv(self._resampled(activation(first_norm(x))))
        condition = self.emb_layers(emb)[:, :, None, None]
        if self.scales:
            scale, shift = condition.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + condition)
        return self.skip_connection(self._resampled(x)) + self.out_layers[1:](h)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x


class AttentionBlock(nn.Module):
    """Self-attention over the pixels. is_split_first: channels of qkv are ordered (qkv, head, c) instead of (head, qkv,
    c)."""

    def __init__(self, channels: int, num_heads: int, *, is_split_first: bool):
        super().__init__()
        self.num_heads = num_heads
        self.is_split_first = is_split_first
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2)  # (N, C, H W)
        qkv = self.qkv(self.norm(pixels))
        if self.is_split_first:
            q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        else:
            q, k, v = qkv.unflatten(1, (self.num_heads, 3, -1)).unbind(2)
        # each (N, heads, H W, c), contiguous for the fast kernels
        q, k, v = (part.transpose(-1, -2).contiguous() for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(pixels.shape)
        return (pixels + self.proj_out(attended)).view(x.shape)


class Stage(nn.ModuleList):
    """Layers one after the other, of which the residual blocks also take the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What the blocks of one network have in common; builds its encoder and its decoder from them."""

    emb_channels: int
    num_res_blocks: int
    dropout: float
    scales: bool
    """Whether the embedding scales and shifts the second norm's output instead of being added to its input."""
    is_updown: bool
    """Whether residual blocks change the resolution instead of plain convolutions."""
    attended: frozenset[int]
    """Downsampling factors at which there is attention, besides the middle."""
    num_head_channels: int
    is_split_first: bool

    def residual(self, in_channels: int, out_channels: int, resample: Resample | None = None) -> ResBlock:
        return ResBlock(
            in_channels, out_channels, self.emb_channels, dropout=self.dropout, scales=self.scales, resample=resample
        )

    def attention(self, width: int, num_heads: int) -> AttentionBlock:
        heads = num_heads if self.num_head_channels == -1 else width // self.num_head_channels
        if heads < 1 or width % heads or (self.num_head_channels != -1 and width % self.num_head_channels):
            raise ValueError(
                f"a layer of width {width} cannot be split into heads: num_heads {num_heads}, num_head_channels "
                f"{self.num_head_channels}"
            )
        return AttentionBlock(width, heads, is_split_first=self.is_split_first)

    def encoder(self, channels: int, widths: Sequence[int], num_heads: int) -> tuple[nn.ModuleList, list[int]]:
        """The stages, and the width of each one's output."""
        width = widths[0]
        stages, skips = [Stage([nn.Conv2d(channels, width, 3, padding=1)])], [width]
        for level, level_width in enumerate(widths):
            for _ in range(self.num_res_blocks):
                layers: list[nn.Module] = [self.residual(width, level_width)]
                width = level_width
                if 2**level in self.attended:
                    layers.append(self.attention(width, num_heads))
                stages.append(Stage(layers))
                skips.append(width)
            if level < len(widths) - 1:
                stages.append(Stage([self.residual(width, width, "down") if self.is_updown else Downsample(width)]))
                skips.append(width)
        return nn.ModuleList(stages), skips

    def decoder(self, skips: Sequence[int], widths: Sequence[int], num_heads: int) -> nn.ModuleList:
        stages, width, remaining = [], widths[-1], list(skips)
        for level, level_width in reversed(list(enumerate(widths))):
            for i in range(self.num_res_blocks + 1):
                layers: list[nn.Module] = [self.residual(width + remaining.pop(), level_width)]
                width = level_width
                if 2**level in self.attended:
                    layers.append(self.attention(width, num_heads))
                if level and i == self.num_res_blocks:
                    layers.append(self.residual(width, width, "up") if self.is_updown else Upsample(width))
                stages.append(Stage(layers))
        return nn.ModuleList(stages)


class UNet(nn.Module):
    """The velocity field; constructor arguments as TorchCFM names them.

    dim: (C, H, W) of an image. attention_resolutions: sides of the feature maps that are attended over, "16" or
    "16,8"; the middle block always is. num_head_channels: width of a head; -1: there are num_heads (num_heads_upsample
    in the decoder, if not -1). num_classes is used with class_cond only. pixel_unshuffle (not TorchCFM's): n x n pixels
    become channels of one position at the input and pixels again at the output, for networks that a CPU can train.
    """

    def __init__(
        self,
        dim: Sequence[int],
        num_channels: int,
        num_res_blocks: int,
        channel_mult: Sequence[float] | None = None,
        learn_sigma: bool = False,
        class_cond: bool = False,
        num_classes: int = 1000,
        attention_resolutions: str = "16",
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        dropout: float = 0.0,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pixel_unshuffle: int = 1,
    ):
        super().__init__()
        self.dim = _checked_dim(dim, pixel_unshuffle)
        self.num_classes = num_classes if class_cond else 0
        self.num_channels = num_channels
        self.pixel_unshuffle = pixel_unshuffle
        channels, *sides = (
            self.dim[0] * pixel_unshuffle**2,
            self.dim[1] // pixel_unshuffle,
            self.dim[2] // pixel_unshuffle,
        )
        widths = _widths(num_channels, channel_mult, sides)
        make = Blocks(
            emb_channels=4 * num_channels,
            num_res_blocks=num_res_blocks,
            dropout=dropout,
            scales=use_scale_shift_norm,
            is_updown=resblock_updown,
            attended=frozenset(sides[1] // int(resolution) for resolution in attention_resolutions.split(",")),
            num_head_channels=num_head_channels,
            is_split_first=use_new_attention_order,
        )
        linear = nn.Linear(num_channels, make.emb_channels)
        self.time_embed = nn.Sequential(linear, nn.SiLU(), nn.Linear(make.emb_channels, make.emb_channels))
        if self.num_classes:
            self.label_emb = nn.Embedding(self.num_classes, make.emb_channels)
        self.input_blocks, skips = make.encoder(channels, widths, num_heads)
        deepest = widths[-1]
        self.middle_block = Stage(
            [make.residual(deepest, deepest), make.attention(deepest, num_heads), make.residual(deepest, deepest)]
        )
        self.output_blocks = make.decoder(skips, widths, num_heads if num_heads_upsample == -1 else num_heads_upsample)
        last = nn.Conv2d(widths[0], channels * (2 if learn_sigma else 1), 3, padding=1)
        self.out = nn.Sequential(norm(widths[0]), nn.SiLU(), zeroed(last))

    def embed(self, t: Tensor, batch: int, y: Tensor | None) -> Tensor:
        """(N, E) from times as in `forward` and class indices (N,)."""
        if (y is None) != (self.num_classes == 0):
            raise ValueError(
                f"the network takes {self.num_classes or 'no'} classes, but labels are "
                f"{'missing' if y is None else 'given'}"
            )
        t = t.flatten(1)[:, 0] if t.ndim > 1 else t
        emb = self.time_embed(timestep_embedding(t.expand(batch), self.num_channels))
        return emb if y is None else emb + self.label_emb(y)

    def forward(self, t: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        """t: (N,) or (), in [0, 1]; of (N, k) the first column counts, as published; x: (N, C, H, W); y: (N,) class
        indices, if the network is conditional. Returns (N, C or 2 C, H, W)."""
        emb = self.embed(t, len(x), y)
        h = F.pixel_unshuffle(x, self.pixel_unshuffle)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return F.pixel_shuffle(self.out(h), self.pixel_unshuffle)


def _checked_dim(dim: Sequence[int], pixel_unshuffle: int) -> tuple[int, int, int]:
    if len(dim) != 3 or min(dim) < 1:
        raise ValueError(f"dim must be (channels, height, width), got {dim!r}")
    if pixel_unshuffle < 1 or dim[1] % pixel_unshuffle or dim[2] % pixel_unshuffle:
        raise ValueError(f"pixel_unshuffle ({pixel_unshuffle}) must divide the image's sides, {dim[1]} x {dim[2]}")
    return (dim[0], dim[1], dim[2])


def _widths(num_channels: int, channel_mult: Sequence[float] | None, sides: Sequence[int]) -> list[int]:
    if channel_mult is None:
        if sides[1] not in CHANNEL_MULT:
            raise ValueError(
                f"channel_mult: there is a default for images of side {', '.join(map(str, CHANNEL_MULT))}, not "
                f"{sides[1]}"
            )
        channel_mult = CHANNEL_MULT[sides[1]]
    widths = [int(factor * num_channels) for factor in channel_mult]
    if not widths or any(width < 1 or width % NUM_GROUPS for width in widths):
        raise ValueError(
            f"the levels' widths (channel_mult times num_channels) must be multiples of {NUM_GROUPS}, got {widths}"
        )
    if any(side % 2 ** (len(widths) - 1) for side in sides):
        raise ValueError(
            f"{len(widths)} levels halve the image {len(widths) - 1} times, which its sides {list(sides)} do not allow"
        )
    return widths
