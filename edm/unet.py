"""The two U-Nets of EDM: SongUNet (DDPM++ and NCSN++, arXiv 2011.13456) and DhariwalUNet (ADM, arXiv 2105.05233).

Attribute names and constructor arguments are those of the published checkpoints. A network is a mapping (scalars to the
embedding `emb`) followed by an encoder and a decoder, which edm/unet_levels.py builds and runs; IMM puts another
mapping before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm.layers import BlockStyle, Conv2d, FourierEmbedding, GroupNorm, Init, Linear, PositionalEmbedding
from edm.unet_levels import Levels, decode, encode

SONG_INIT = Init("xavier_uniform")
SONG_INIT_OUT = Init("xavier_uniform", weight=1e-5)
SONG_INIT_QKV = Init("xavier_uniform", weight=math.sqrt(0.2))
ADM_INIT = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
ADM_INIT_OUT = Init("kaiming_uniform", weight=0.0)


class SongUNet(nn.Module):
    """DDPM++ (positional, standard, standard, mult 1, [1, 1]) and NCSN++ (fourier, residual, standard, mult 2, [1, 3,
    3, 1]).

    forward: x (B, in_channels, R, R); noise_labels (B,) or (1,); class_labels (B or 1, label_dim) one-hot, zero
    rows are the null class; augment_labels (B, augment_dim) or None -> (B, out_channels, R, R).
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ):
        super().__init__()
        _one_of("embedding_type", embedding_type, "positional", "fourier")
        _one_of("encoder_type", encoder_type, "standard", "skip", "residual")
        _one_of("decoder_type", decoder_type, "standard", "skip")
        self.label_dim = label_dim
        self.augment_dim = augment_dim
        self.label_dropout = label_dropout  # applied by the loss, which owns all random numbers of a training step
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise

        self.map_noise = (
            FourierEmbedding(noise_channels)
            if embedding_type == "fourier"
            else PositionalEmbedding(noise_channels, endpoint=True)
        )
        self.map_label = Linear(label_dim, noise_channels, init=SONG_INIT) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, init=SONG_INIT, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=SONG_INIT)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=SONG_INIT)
        levels = Levels(
            img_resolution=img_resolution,
            in_channels=in_channels,
            out_channels=out_channels,
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            encoder_type=encoder_type,
            decoder_type=decoder_type,
            style=song_style(emb_channels=emb_channels, dropout=dropout, resample_filter=resample_filter),
        )
        self.enc = levels.encoder()
        self.dec = levels.decoder(self.enc)

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """The embedding (B or 1, emb_channels) that conditions every block, before its last silu."""
        cos, sin = self.map_noise(noise_labels).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)
        if self.map_label is not None:
            emb = emb + self.map_label(_required(class_labels) * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return self.map_layer1(F.silu(self.map_layer0(emb)))

    def blocks(self, x: Tensor, emb: Tensor) -> Tensor:
        """Encoder and decoder, conditioned on a finished embedding."""
        return decode(self.dec, encode(self.enc, x, emb), emb)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # cheap; bfloat16 cannot tell noise levels apart
            emb = F.silu(self.embed(noise_labels, class_labels, augment_labels))
        return self.blocks(x, emb)


def song_style(*, emb_channels: int, dropout: float, resample_filter: Sequence[int]) -> BlockStyle:
    """The blocks of SongUNet."""
    return BlockStyle(
        emb_channels=emb_channels,
        dropout=dropout,
        eps=1e-6,
        init=SONG_INIT,
        init_out=SONG_INIT_OUT,
        init_qkv=SONG_INIT_QKV,
        skip_scale=math.sqrt(0.5),
        resample_filter=tuple(resample_filter),
        projects_resampled=True,
        adaptive_scale=False,
        channels_per_head=None,
    )


def adm_style(*, emb_channels: int, dropout: float) -> BlockStyle:
    """The blocks of DhariwalUNet."""
    return BlockStyle(
        emb_channels=emb_channels,
        dropout=dropout,
        eps=1e-5,
        init=ADM_INIT,
        init_out=ADM_INIT_OUT,
        init_qkv=ADM_INIT,
        projects_resampled=False,
        adaptive_scale=True,
        channels_per_head=64,
    )


class DhariwalUNet(nn.Module):
    """ADM. Labels join after the second mapping layer; otherwise called like SongUNet.

    As in the published network, a layer narrower than 64 channels has no attention, even where it is asked for.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ):
        super().__init__()
        self.augment_dim = augment_dim
        self.label_dropout = label_dropout  # applied by the loss, which owns all random numbers of a training step
        emb_channels = model_channels * channel_mult_emb
        label_init = Init("kaiming_normal", weight=math.sqrt(label_dim))

        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = Linear(augment_dim, model_channels, init=ADM_INIT_OUT, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=ADM_INIT)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=ADM_INIT)
        self.map_label = Linear(label_dim, emb_channels, init=label_init, bias=False) if label_dim else None
        levels = Levels(
            img_resolution=img_resolution,
            in_channels=in_channels,
            out_channels=out_channels,
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            stem_mult=channel_mult[0],
            attention_in="every",
            decoder_type="plain",
            style=adm_style(emb_channels=emb_channels, dropout=dropout),
        )
        self.enc = levels.encoder()
        self.dec = levels.decoder(self.enc)
        self.out_norm = GroupNorm(model_channels * channel_mult[0], eps=1e-5)
        self.out_conv = Conv2d(model_channels * channel_mult[0], out_channels, 3, init=ADM_INIT_OUT)

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """The embedding (B or 1, emb_channels) that conditions every block, before its last silu."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(_required(class_labels))
        return emb

    def blocks(self, x: Tensor, emb: Tensor) -> Tensor:
        """Encoder, decoder and output layers, conditioned on a finished embedding."""
        return self.out_conv(F.silu(self.out_norm(decode(self.dec, encode(self.enc, x, emb), emb))))

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # cheap; bfloat16 cannot tell noise levels apart
            emb = F.silu(self.embed(noise_labels, class_labels, augment_labels))
        return self.blocks(x, emb)


def _required(class_labels: Tensor | None) -> Tensor:
    if class_labels is None:
        raise ValueError("this network is class-conditional: pass one-hot class_labels (zero rows for the null class)")
    return class_labels


def _one_of(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
