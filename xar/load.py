"""Reading xAR's files. The published ones hold weights only: the sizes are derived from the shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from neon import config_table
from neon.checkpoints.checkpoint import read
from xar.cells import causal_mask, rotary_angles, rotary_frequencies
from xar.transformer import XARArch, XARTransformer
from xar.vae import KL16, KL16Arch

TABLE_TOLERANCE = 1e-5
"""The tables of a file were made by another version of torch: they may differ from ours in the last bits."""


def arch_from_shapes(tensors: Mapping[str, Tensor]) -> XARArch:
    """The sizes of a state dict.

    Raises ValueError if it is no xAR transformer's.
    """
    try:
        width, head_width = tensors["pred.weight"].shape[1], 4 * len(tensors["encoder_blocks.0.attn.rope.freqs"])
        num_classes = len(tensors["class_emb.weight"]) - 1
    except KeyError as error:
        raise ValueError(f"no xAR transformer: it has no {error} among its {len(tensors)} tensors") from error
    depths = {
        prefix: len({name.split(".")[1] for name in tensors if name.startswith(prefix)})
        for prefix in ("encoder_blocks.", "decoder_blocks.")
    }
    return XARArch(
        width=width,
        num_heads=width // head_width,
        encoder_depth=depths["encoder_blocks."],
        decoder_depth=depths["decoder_blocks."],
        num_classes=num_classes,
    )


def check_tables(model: XARTransformer, path: Path) -> None:
    """Raises ValueError if a mask or rotary table that `path` has put into the model is not that of its sizes."""
    head_width = model.pred.in_features // model.num_heads
    angles = rotary_angles(head_width)
    tables = {
        "mask": causal_mask(),
        "freqs": rotary_frequencies(head_width),
        "freqs_cos": angles.cos(),
        "freqs_sin": angles.sin(),
    }
    for name, stored in model.named_buffers():
        if not torch.allclose(stored, tables[name.rpartition(".")[2]], rtol=0, atol=TABLE_TOLERANCE):
            raise ValueError(
                f"{path}: the table {name!r} is not that of an xAR model with 2 x 2 cells of 8 x 8 tokens; the file "
                "belongs to another network, or a merge has damaged it"
            )


def read_autoencoder(path: Path) -> KL16:
    """The autoencoder of a file: the published `kl16.ckpt`, or one of `neon train-autoencoder`, whose file states its
    sizes."""
    found = read(path, weights="any")
    return found.filled(KL16, config_table.build(KL16Arch, found.arch or {}, "arch"))
