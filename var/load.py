"""Reading VAR's files. The published ones hold weights only: names and shapes give the constructor arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from neon import config_table
from neon.checkpoints import checkpoint
from neon.checkpoints.safetensors_format import metas
from var.presets import PATCH_NUMS
from var.vqvae import VQVAE, VQVAEArch


def transformer_arch_of(state: Mapping[str, Tensor]) -> dict[str, object]:
    """Constructor arguments (`VARArch`) of the network whose state dict this is.

    What shapes do not show is taken from the published models: drop_path = 0.1 depth / 24 and, without attn_l2_norm,
    heads of width 64. Raises ValueError if entries that every VAR has are missing.
    """
    needed = ("pos_1LC", "lvl_1L", "word_embed.weight", "class_emb.weight", "head.weight", "blocks.0.attn.proj.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        first = ", ".join(list(state)[:3])
        raise ValueError(
            f"not a VAR state dict: {', '.join(missing)} missing among {len(state)} entries (first: {first})"
        )
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    embed_dim, code_width = state["word_embed.weight"].shape
    scale_mul = state.get("blocks.0.attn.scale_mul_1H11")
    counts = torch.bincount(state["lvl_1L"].flatten().long()).tolist()
    sides = [math.isqrt(count) for count in counts]
    if any(side < 1 or side * side != count for side, count in zip(sides, counts, strict=True)):
        raise ValueError(
            f"lvl_1L lists {counts} tokens per scale, expected squares: it is not that of a VAR, or a merge has "
            "damaged it"
        )
    return {
        "depth": depth,
        "embed_dim": embed_dim,
        "heads": embed_dim // 64 if scale_mul is None else scale_mul.shape[1],
        "patch_nums": sides,
        "num_classes": state["class_emb.weight"].shape[0] - 1,
        "vocabulary": state["head.weight"].shape[0],
        "code_width": code_width,
        "shared_aln": "shared_ada_lin.1.weight" in state,
        "attn_l2_norm": scale_mul is not None,
        "drop_path": 0.1 * depth / 24,
    }


def tokeniser_arch_of(state: Mapping[str, Tensor]) -> dict[str, object]:
    """Constructor arguments (`VQVAEArch`) of a published tokeniser's state dict, which serves several resolutions.

    Raises ValueError if it is no such state dict, or has not the ten scales of the published resolutions.
    """
    needed = (
        "encoder.conv_in.weight",
        "quantize.embedding.weight",
        "quantize.ema_vocab_hit_SV",
        "encoder.down.0.block.0.conv1.weight",
    )
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"not a VQ-VAE of VAR: {', '.join(missing)} missing among {len(state)} entries")
    channels, image_channels = state["encoder.conv_in.weight"].shape[:2]
    vocabulary, code_width = state["quantize.embedding.weight"].shape
    num_scales = len(state["quantize.ema_vocab_hit_SV"])
    if num_scales != len(PATCH_NUMS[256]):
        raise ValueError(
            f"this VQ-VAE has {num_scales} scales, the published one {len(PATCH_NUMS[256])}; its file must name its "
            "patch_nums"
        )
    blocks = [name.split(".") for name in state if name.startswith("encoder.down.") and name.endswith(".conv1.weight")]
    levels = sorted({int(parts[2]) for parts in blocks})
    phis = {name.rsplit(".", 1)[0] for name in state if name.startswith("quantize.quant_resi.")}
    is_partial = any("qresi_ls" in name for name in phis)
    return {
        "patch_nums": list(PATCH_NUMS[256]),
        "ch": channels,
        "ch_mult": [len(state[f"encoder.down.{level}.block.0.conv1.weight"]) // channels for level in levels],
        "num_res_blocks": sum(parts[2] == "0" for parts in blocks),
        "z_channels": code_width,
        "image_channels": image_channels,
        "vocab_size": vocabulary,
        "share_quant_resi": len(phis) if is_partial or len(phis) == 1 else 0,
    }


def read_tokeniser(path: Path) -> VQVAE:
    """The VQ-VAE of a file: ours, which names its constructor arguments, or the published vae_ch160v4096z32.pth."""
    file = checkpoint.read(path, weights="any")
    try:
        arch = tokeniser_arch_of(metas(file.tensors)) if file.arch is None else file.arch
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return file.filled(VQVAE, config_table.build(VQVAEArch, arch, "autoencoder.arch"))
