"""Files as the published command finds them: bare state dicts of a VAR and of the VQ-VAE, reference statistics."""

from pathlib import Path

import torch

from tests import goldens
from tests.quarters_extractor import write_statistics
from var.presets import PATCH_NUMS, published
from var.transformer import Transformer, VARArch
from var.vqvae import VQVAE, VQVAEArch

TINY = VARArch(
    depth=2,
    embed_dim=16,
    heads=2,
    patch_nums=PATCH_NUMS[256],
    num_classes=10,
    vocabulary=24,
    code_width=4,
    drop_path=0.1 / 12,
)
TINY_VQVAE = VQVAEArch(patch_nums=PATCH_NUMS[256], ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, vocab_size=24)
"""Halves the image once: 32 x 32 pixels from 16 x 16 tokens."""


def write_files(folder: Path, arch: VARArch, vqvae: VQVAEArch) -> None:
    torch.save(goldens.seed_by_name(Transformer(arch)).state_dict(), folder / "var.pth")
    torch.save(goldens.seed_by_name(VQVAE(vqvae)).state_dict(), folder / "vae.pth")
    write_statistics(folder / "stats.npz")


def write_tiny(folder: Path) -> None:
    write_files(folder, TINY, TINY_VQVAE)


def write_real(folder: Path) -> None:
    """VAR-d16 and the VQ-VAE in their true sizes, with random weights."""
    write_files(folder, published("d16"), VQVAEArch(patch_nums=PATCH_NUMS[256]))
