"""Published EDM networks (Karras et al. 2022, arXiv 2206.00364): the constructor arguments that their files hold."""

from __future__ import annotations

from collections.abc import Mapping

Arch = Mapping[str, object]

DDPMPP: Arch = {
    "class_name": "EDMPrecond",
    "img_channels": 3,
    "label_dim": 0,
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
    "model_channels": 128,
    "augment_dim": 9,
    "use_fp16": False,
}
"""Files named -vp: the architecture of the VP models, with EDM's own preconditioning."""

NCSNPP: Arch = {
    **DDPMPP,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
"""Files named -ve."""

CIFAR10: Arch = {"img_resolution": 32, "channel_mult": [2, 2, 2], "dropout": 0.13}
FFHQ: Arch = {"img_resolution": 64, "channel_mult": [1, 2, 2, 2], "dropout": 0.05}

MODELS: Mapping[str, Arch] = {
    "edm-cifar10-32x32-cond-vp": {**DDPMPP, **CIFAR10, "label_dim": 10},
    "edm-cifar10-32x32-uncond-vp": {**DDPMPP, **CIFAR10},
    "edm-cifar10-32x32-cond-ve": {**NCSNPP, **CIFAR10, "label_dim": 10},
    "edm-cifar10-32x32-uncond-ve": {**NCSNPP, **CIFAR10},
    "edm-ffhq-64x64-uncond-vp": {**DDPMPP, **FFHQ},
    "edm-ffhq-64x64-uncond-ve": {**NCSNPP, **FFHQ},
    "edm-imagenet-64x64-cond-adm": {
        "class_name": "EDMPrecond",
        "img_resolution": 64,
        "img_channels": 3,
        "label_dim": 1000,
        "model_type": "DhariwalUNet",
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "dropout": 0.1,
        "use_fp16": True,
    },
}
"""By the name of the published file. Neon's files hold the same networks as the -vp ones."""

NUM_STEPS: Mapping[int, int] = {32: 18, 64: 40}
"""Solver steps by resolution, for the base models' published FIDs and Neon's."""
