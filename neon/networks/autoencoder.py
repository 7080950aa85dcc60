"""The convolutional encoder and decoder that the VQ-VAE of VAR, the KL-VAE of xAR and the SD VAE of IMM share.

Rombach et al. 2022 (arXiv 2112.10752). Attribute names are those of the published CompVis state dicts
(`down.0.block.1.conv2`, `mid.attn_1.q`, ...); level 0 is the full resolution in the encoder and in the decoder. The
three published networks share all of the mathematics: `ConvArch` lists everything that differs.
"""

# B batch, C channels, H height, W width, N = H * W positions, Z latent channels

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOGVAR_RANGE = (-30.0, 20.0)
"""Log variances of a KL posterior are clipped to this range before use (all published KL autoencoders)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvArch:
    """Sizes of one encoder/decoder pair, and the options in which the published networks differ.

    Raises ValueError if a width cannot be split into `num_groups` normalisation groups or a level does not exist.
    """

    ch: int  # channels at full resolution
    ch_mult: tuple[int, ...]  # channels of level i = ch * ch_mult[i]; every level but the last halves the resolution
    num_res_blocks: int  # residual blocks per encoder level; decoder levels have one more
    z_channels: int
    image_channels: int = 3
    has_moments: bool = False  # the encoder emits mean and log variance: 2 * z_channels channels
    encoder_attention: tuple[int, ...] = ()  # levels whose blocks are followed by attention (the middle always has it)
    decoder_attention: tuple[int, ...] = ()
    has_fused_qkv: bool = False  # one 1x1 convolution `qkv` (VAR) instead of `q`, `k` and `v`
    num_groups: int = 32

    def __post_init__(self) -> None:
        for mult in self.ch_mult:
            if self.ch * mult % self.num_groups:
                raise ValueError(
                    f"autoencoder width ch * ch_mult = {self.ch * mult} must be a multiple of {self.num_groups} "
                    "(num_groups)"
                )
        for level in (*self.encoder_attention, *self.decoder_attention):
            if not 0 <= level < len(self.ch_mult):
                raise ValueError(
                    f"autoencoder attention at level {level}, but ch_mult {self.ch_mult} has {len(self.ch_mult)} levels"
                )

    @property
    def widths(self) -> list[int]:
        """Channels of every level, full resolution first."""
        return [self.ch * mult for mult in self.ch_mult]

    @property
    def downsampling(self) -> int:
        """Image side / latent side."""
        return 1 << (len(self.ch_mult) - 1)


class Norm(nn.GroupNorm):
    def __init__(self, channels: int, arch: ConvArch):
        super().__init__(arch.num_groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the skip where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, arch: ConvArch):
        super().__init__()
        self.norm1 = Norm(in_channels, arch)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Norm(out_channels, arch)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual connection. softmax(q k^T / sqrt(C)) v."""

    def __init__(self, channels: int, arch: ConvArch):
        super().__init__()
        self.norm = Norm(channels, arch)
        if arch.has_fused_qkv:
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        else:
            self.q = nn.Conv2d(channels, channels, 1)
            self.k = nn.Conv2d(channels, channels, 1)
            self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self._is_fused = arch.has_fused_qkv

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        projections = self.qkv(h).chunk(3, dim=1) if self._is_fused else (self.q(h), self.k(h), self.v(h))
        q, k, v = (p.flatten(2).transpose(1, 2)[:, None] for p in projections)  # (B, 1, N, C)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, N, C)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))  # in place it could have another layout than x


COMPILED = (ResBlock, Attention)
"""Blocks that sampling.speed = "compiled" fuses."""


class Downsample(nn.Module):
    """Halves the resolution. The padding is on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the arch asks for it."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, arch: ConvArch, *, has_attention: bool):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (num_blocks - 1)
        self.block = nn.ModuleList(ResBlock(channels, out_channels, arch) for channels in inputs)
        self.attn = nn.ModuleList(Attention(out_channels, arch) for _ in inputs if has_attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class DownLevel(Level):
    def __init__(self, in_channels: int, level: int, arch: ConvArch):
        width = arch.widths[level]
        super().__init__(in_channels, width, arch.num_res_blocks, arch, has_attention=level in arch.encoder_attention)
        self.downsample = Downsample(width) if level < len(arch.widths) - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.downsample is None else self.downsample(x)


class UpLevel(Level):
    def __init__(self, in_channels: int, level: int, arch: ConvArch):
        width = arch.widths[level]
        super().__init__(
            in_channels, width, arch.num_res_blocks + 1, arch, has_attention=level in arch.decoder_attention
        )
        self.upsample = Upsample(width) if level > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.upsample is None else self.upsample(x)


def middle(channels: int, arch: ConvArch) -> nn.Sequential:
    """The blocks at the lowest resolution, between the levels and the latent."""
    return nn.Sequential(
        OrderedDict(
            block_1=ResBlock(channels, channels, arch),
            attn_1=Attention(channels, arch),
            block_2=ResBlock(channels, channels, arch),
        )
    )


class Encoder(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> (B, Z, H/f, W/f), f = arch.downsampling; 2 Z channels if
    arch.has_moments."""

    def __init__(self, arch: ConvArch):
        super().__init__()
        widths = arch.widths
        inputs = [arch.ch, *widths[:-1]]
        self.conv_in = nn.Conv2d(arch.image_channels, arch.ch, 3, padding=1)
        self.down = nn.ModuleList(DownLevel(channels, i, arch) for i, channels in enumerate(inputs))
        self.mid = middle(widths[-1], arch)
        self.norm_out = Norm(widths[-1], arch)
        self.conv_out = nn.Conv2d(widths[-1], arch.z_channels * (2 if arch.has_moments else 1), 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x)), inplace=True))


class Decoder(nn.Module):
    """Latents (B, Z, h, w) -> images (B, C, f h, f w), not clipped. `up[0]` is the full resolution, executed last."""

    def __init__(self, arch: ConvArch):
        super().__init__()
        widths = arch.widths
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(arch.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], arch)
        self.up = nn.ModuleList(UpLevel(channels, i, arch) for i, channels in enumerate(inputs))
        self.norm_out = Norm(widths[0], arch)
        self.conv_out = nn.Conv2d(widths[0], arch.image_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class KLAutoencoder(nn.Module):
    """Encoder and decoder around a diagonal Gaussian posterior, with 1x1 convolutions on either side of the latent.

    Moments are (B, 2 Z, h, w): the mean, then the log variance. Computations run in the dtype of the weights.
    """

    def __init__(self, arch: ConvArch):
        super().__init__()
        if not arch.has_moments:
            raise ValueError("a KL autoencoder needs a arch with has_moments=True")
        self.arch = arch
        self.encoder = Encoder(arch)
        self.decoder = Decoder(arch)
        self.quant_conv = nn.Conv2d(2 * arch.z_channels, 2 * arch.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(arch.z_channels, arch.z_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> moments (B, 2 Z, h, w)."""
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, Z, h, w) in the posterior's own units -> images (B, C, H, W), about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype)))


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (B, Z, h, w) each, of moments (B, 2 Z, h, w)."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """mean + std * noise; noise: (B, Z, h, w) unit normal."""
    mean, std = mean_and_std(moments)
    return mean + std * noise


def kl_to_unit_normal(moments: Tensor) -> Tensor:
    """KL(posterior || N(0, 1)) in nats, summed over channels and positions: (B,). Kingma and Welling 2014, appendix
    B."""
    mean, logvar = moments.chunk(2, dim=1)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
