"""Files as the published command finds them: a bare state dict, `kl16.ckpt` with its wrapper, reference statistics."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from neon import config_table
from neon.checkpoints import checkpoint
from tests import goldens
from tests.quarters_extractor import write_statistics
from tests.xar.test_transformer import ARCH
from xar.transformer import XARArch, XARTransformer
from xar.vae import KL16, KL16Arch

TINY_VAE = {
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "num_groups": 4,
    "resolution": 32,
    "encoder_attn_resolutions": [],
}


def write_tiny(folder: Path) -> None:
    """A base model, a fine-tuned one under `model_ema`, and an autoencoder of 32 x 32 images, which states its
    sizes."""
    model = goldens.seed_by_name(XARTransformer(ARCH))
    torch.save(model.state_dict(), folder / "base.pth")
    tuned = {**model.state_dict(), **{name: nn.Parameter(value * 1.01) for name, value in model.named_parameters()}}
    torch.save({"model_ema": tuned, "epoch": 3}, folder / "tuned.pth")
    vae = goldens.seed_by_name(KL16(config_table.build(KL16Arch, TINY_VAE, "arch")))
    checkpoint.write(folder / "vae.safetensors", vae.state_dict(), metadata={"arch": TINY_VAE})
    write_statistics(folder / "stats.npz")


def write_real(folder: Path, size: XARArch) -> None:
    """The true layout in the true size, with random weights."""
    torch.save(goldens.seed_by_name(XARTransformer(size)).state_dict(), folder / "model.pth")
    torch.save({"model": goldens.seed_by_name(KL16(KL16Arch())).state_dict()}, folder / "kl16.ckpt")
    write_statistics(folder / "stats.npz")
