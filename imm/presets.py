"""Published IMM models and recipes as data. Sources: arXiv 2503.07565 (base models), arXiv 2510.03597 (Neon)."""

from __future__ import annotations

from typing import Literal

from neon.networks.autoencoder import ConvArch

IMAGENET256: dict[str, object] = {
    "class_name": "IMMPrecond",
    "img_resolution": 32,
    "img_channels": 4,
    "label_dim": 1000,
    "model_type": "DiT_XL_2",
    "s_embed": True,
    "noise_schedule": "fm",
    "f_type": "euler_fm",
    "temb_type": "stride",
    "time_scale": 1000,
    "sigma_data": 0.5,
    "eps": 0.0,
    "T": 0.994,
}
"""`imagenet256_ts_a2.pkl`, the base of Neon's rows, on latents of sd-vae-ft-ema. 676,735,504 parameters."""

IMAGENET256_IDENTITY: dict[str, object] = {**IMAGENET256, "temb_type": "identity"}
"""`imagenet256_s_a1.pkl`: the same names and shapes; only temb_type differs."""

CIFAR10: dict[str, object] = {
    "class_name": "IMMPrecond",
    "img_resolution": 32,
    "img_channels": 3,
    "label_dim": 0,
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
    "s_embed": True,
    "dropout": 0.2,
    "noise_schedule": "fm",
    "f_type": "simple_edm",
    "temb_type": "identity",
    "time_scale": 1000,
    "eps": 0.006,
    "T": 0.994,
}
"""Unconditional CIFAR-10 in pixel space."""

CIFAR10_WITH_AUGMENT: dict[str, object] = {**CIFAR10, "augment_dim": 9}
"""The same as its training config builds it, with an input for augmentation labels."""

MODELS = {
    "imm_imagenet256_ts_a2": IMAGENET256,
    "Neon_imm_imagenet256": IMAGENET256,
    "imm_cifar10": CIFAR10,
    "imm_cifar10_with_augment": CIFAR10_WITH_AUGMENT,
}
"""Constructor arguments by the name of the manifest that their state dict equals."""

SD_VAE = ConvArch(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4, has_moments=True)
"""The autoencoder of stabilityai/sd-vae-ft-ema and sd-vae-ft-mse."""

Protocol = Literal["neon", "base"]
CFG_SCALE: dict[Protocol, float] = {"neon": 1.8, "base": 1.5}
"""Guidance on ImageNet-256. neon: of the 8-step row, those of 1, 2 and 4 steps were not stated. base: of every base row
and of S."""

SAMPLING: dict[str, dict[int, dict[str, object]]] = {
    "imagenet256": {steps: {"num_steps": steps, "cfg_scale": CFG_SCALE["base"]} for steps in (1, 2, 4, 8)},
    "cifar10": {1: {"num_steps": 1}, 2: {"num_steps": 2, "grid": "explicit", "mid_nt": (1.4,)}},
}
"""Options of the pushforward sampler by model and number of steps, as published for the base models; else the grid is
uniform."""
