"""The levels of the EDM U-Nets: which blocks the encoder and the decoder have, in which order, and where the skip
connections go. Names are those of the published state dicts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm.layers import BlockStyle, Conv2d, GroupNorm, UNetBlock


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Sizes of SongUNet or DhariwalUNet; makes its encoder and decoder, each a ModuleDict whose entries are named
    RESxRES_WHAT."""

    img_resolution: int
    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: Sequence[int]
    num_blocks: int
    attn_resolutions: Sequence[int]
    style: BlockStyle
    stem_mult: int = 1
    """The first convolution has model_channels * stem_mult output channels."""
    attention_in: Literal["last", "every"] = "last"
    """Which decoder blocks of a level in `attn_resolutions` attend."""
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip", "plain"] = "standard"
    """plain: no output layers, the decoder ends with its last block."""

    def __post_init__(self) -> None:
        coarsest = self.img_resolution >> (len(self.channel_mult) - 1)
        if coarsest << (len(self.channel_mult) - 1) != self.img_resolution or coarsest < 1:
            raise ValueError(
                f"img_resolution {self.img_resolution} cannot be halved {len(self.channel_mult) - 1} times, as "
                f"channel_mult {list(self.channel_mult)} asks: choose fewer levels or another resolution"
            )

    def encoder(self) -> nn.ModuleDict:
        """Levels from fine to coarse; every entry without `aux` in its name gives a skip connection."""
        enc = nn.ModuleDict()
        channels, aux_channels = self.model_channels * self.stem_mult, self.in_channels
        taps, init = self.style.resample_filter, self.style.init
        for level, mult in enumerate(self.channel_mult):
            res = self.img_resolution >> level
            name = f"{res}x{res}"
            if level == 0:
                enc[f"{name}_conv"] = Conv2d(self.in_channels, channels, 3, init=init)
            else:
                enc[f"{name}_down"] = UNetBlock(channels, channels, self.style, resample="down")
                if self.encoder_type == "skip":
                    enc[f"{name}_aux_down"] = Conv2d(
                        aux_channels, aux_channels, 0, init=init, resample="down", resample_filter=taps
                    )
                    enc[f"{name}_aux_skip"] = Conv2d(aux_channels, channels, 1, init=init)
                if self.encoder_type == "residual":
                    enc[f"{name}_aux_residual"] = Conv2d(
                        aux_channels, channels, 3, init=init, resample="fused_down", resample_filter=taps
                    )
                    aux_channels = channels
            for index in range(self.num_blocks):
                attention = res in self.attn_resolutions
                enc[f"{name}_block{index}"] = UNetBlock(
                    channels, self.model_channels * mult, self.style, attention=attention
                )
                channels = self.model_channels * mult
        return enc

    def decoder(self, enc: nn.ModuleDict) -> nn.ModuleDict:
        """Levels from coarse to fine; every `block` first joins the skip connection on top of the stack."""
        dec = nn.ModuleDict()
        skips = [
            block.out_channels
            for name, block in enc.items()
            if "aux" not in name and isinstance(block, Conv2d | UNetBlock)
        ]
        channels = skips[-1]
        for level in reversed(range(len(self.channel_mult))):
            res = self.img_resolution >> level
            name = f"{res}x{res}"
            is_coarsest = level == len(self.channel_mult) - 1
            if is_coarsest:
                dec[f"{name}_in0"] = UNetBlock(channels, channels, self.style, attention=True)
                dec[f"{name}_in1"] = UNetBlock(channels, channels, self.style)
            else:
                dec[f"{name}_up"] = UNetBlock(channels, channels, self.style, resample="up")
            for index in range(self.num_blocks + 1):
                attention = res in self.attn_resolutions and (self.attention_in == "every" or index == self.num_blocks)
                out_channels = self.model_channels * self.channel_mult[level]
                dec[f"{name}_block{index}"] = UNetBlock(
                    channels + skips.pop(), out_channels, self.style, attention=attention
                )
                channels = out_channels
            if self.decoder_type == "skip" or (self.decoder_type == "standard" and level == 0):
                self._add_output(dec, name, channels, adds_coarser=not is_coarsest and self.decoder_type == "skip")
        return dec

    def _add_output(self, dec: nn.ModuleDict, name: str, channels: int, *, adds_coarser: bool) -> None:
        out, style = self.out_channels, self.style
        if adds_coarser:
            dec[f"{name}_aux_up"] = Conv2d(
                out, out, 0, init=style.init, resample="up", resample_filter=style.resample_filter
            )
        dec[f"{name}_aux_norm"] = GroupNorm(channels, style.eps)
        dec[f"{name}_aux_conv"] = Conv2d(channels, out, 3, init=style.init_out)


def encode(enc: nn.ModuleDict, x: Tensor, emb: Tensor) -> list[Tensor]:
    """The outputs of the encoder of `Levels`, from fine to coarse. x: (B, in_channels, R, R)."""
    skips: list[Tensor] = []
    aux = x
    for name, block in enc.items():
        if "aux_down" in name:
            aux = block(aux)
        elif "aux_skip" in name:
            x = skips[-1] = x + block(aux)
        elif "aux_residual" in name:
            x = skips[-1] = aux = (x + block(aux)) / math.sqrt(2)
        else:
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
    return skips


def decode(dec: nn.ModuleDict, skips: list[Tensor], emb: Tensor) -> Tensor:
    """The image (B, out_channels, R, R) of a decoder with output layers, else the last block's activations."""
    skips = list(skips)
    x, image = skips[-1], None
    for name, block in dec.items():
        if "aux_up" in name:
            image = block(image)
        elif "aux_norm" in name:
            normed = block(x)
        elif "aux_conv" in name:
            out = block(F.silu(normed))
            image = out if image is None else out + image
        else:
            x = block(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
    return x if image is None else image
