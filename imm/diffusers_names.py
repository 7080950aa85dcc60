"""What diffusers calls the parameters of a Stable Diffusion autoencoder: current names, and those of older files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from neon.networks.autoencoder import ConvArch, KLAutoencoder

RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
LEGACY_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def from_diffusers(tensors: Mapping[str, Tensor], arch: ConvArch) -> dict[str, Tensor]:
    """A published state dict under our names, for a strict load into KLAutoencoder(arch).

    Attention may have its current or its legacy names, and matrices (C, C) or 1x1 convolutions (C, C, 1, 1). Names that
    are not known are kept, so that the strict load reports them.
    """
    is_legacy = any(".attentions.0.query." in name for name in tensors)
    ours = {
        theirs: name for name, theirs in diffusers_names(arch, LEGACY_ATTENTION if is_legacy else ATTENTION).items()
    }
    renamed = {ours.get(name, name): tensor for name, tensor in tensors.items()}
    return {
        name: tensor[:, :, None, None] if is_attention(name) and tensor.ndim == 2 else tensor
        for name, tensor in renamed.items()
    }


def is_attention(name: str) -> bool:
    """Whether our parameter is one of an attention layer."""
    return ".attn_1." in name


def diffusers_names(arch: ConvArch, attention: Mapping[str, str] = ATTENTION) -> dict[str, str]:
    """{our parameter name: its name in a diffusers file}, in the order of that file."""
    with torch.device("meta"):
        known = KLAutoencoder(arch).state_dict().keys()
    names = {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in _module_names(arch, attention)
        for kind in ("weight", "bias")
    }
    return {ours: theirs for ours, theirs in names.items() if ours in known}


def _module_names(arch: ConvArch, attention: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Pairs (ours, diffusers') of every module that an autoencoder can have."""
    num_levels = len(arch.ch_mult)
    for side, levels, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        yield f"{side}.conv_in", f"{side}.conv_in"
        for position in range(num_levels):
            # diffusers counts the decoder's levels from the lowest resolution
            level = position if side == "encoder" else num_levels - 1 - position
            ours, theirs = f"{side}.{levels}.{level}", f"{side}.{levels}_blocks.{position}"
            for block in range(arch.num_res_blocks + 1):
                yield from _pairs(f"{ours}.block.{block}", f"{theirs}.resnets.{block}", RESNET)
            yield f"{ours}.{resample}.conv", f"{theirs}.{resample}rs.0.conv"
        yield from _pairs(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", attention)
        yield from _pairs(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", RESNET)
        yield from _pairs(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", RESNET)
        yield f"{side}.norm_out", f"{side}.conv_norm_out"
        yield f"{side}.conv_out", f"{side}.conv_out"
    yield from _pairs("", "", {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"})


def _pairs(ours: str, theirs: str, names: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    return [(f"{ours}.{name}".lstrip("."), f"{theirs}.{there}".lstrip(".")) for name, there in names.items()]
