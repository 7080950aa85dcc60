"""Files as the published command finds them: a module pickle of the original layout, a VAE folder, reference
statistics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor, nn

from imm.diffusers_names import diffusers_names, is_attention
from imm.family import IMM
from imm.load import arch_from_diffusers
from neon.networks.autoencoder import ConvArch, KLAutoencoder
from tests import goldens
from tests.core import pickles

TINY_ARCH = {
    "img_resolution": 8,
    "img_channels": 4,
    "label_dim": 10,
    "num_classes": 10,
    "model_type": "DiT",
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "temb_type": "stride",
    "mixed_precision": "fp16",
}
TINY_VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
SD_VAE = {
    **TINY_VAE,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


def write_checkpoint(patch: pytest.MonkeyPatch, path: Path, arch: dict) -> nn.Module:
    """A `network-snapshot-*.pkl`: every class of the original's own is a persistent object, torch's are pickled by
    reference."""
    model = goldens.seed_by_name(IMM().build(arch)).requires_grad_(False)
    pickles.write(
        patch,
        path,
        {
            "ema": as_pickled(model, arch),
            "augment_pipe": None,
            "dataset_kwargs": {"resolution": arch["img_resolution"]},
        },
    )
    return model


def as_pickled(module: nn.Module, init_kwargs: dict) -> object:
    if type(module).__module__.startswith("torch."):
        shallow = module.__class__.__new__(module.__class__)
        shallow.__dict__ = {
            **vars(module),
            "_modules": {name: as_pickled(child, {}) for name, child in module._modules.items()},
        }
        return shallow
    persistent = pickles.persistent_module(module, type(module).__name__, init_kwargs)
    state = persistent.meta["state"]
    state["_modules"] = {
        name: child if child is None else as_pickled(child, {}) for name, child in module._modules.items()
    }
    state.pop("schedule", None)
    return persistent


def to_diffusers(tensors: Mapping[str, Tensor], arch: ConvArch) -> dict[str, Tensor]:
    """Our state dict as diffusers writes it: current names, its order, attention as matrices."""
    return {
        theirs: tensors[ours].flatten(1) if is_attention(ours) and tensors[ours].ndim == 4 else tensors[ours]
        for ours, theirs in diffusers_names(arch).items()
    }


def write_vae(folder: Path, config: dict) -> None:
    folder.mkdir(parents=True)
    arch = arch_from_diffusers(config)
    tensors = to_diffusers(goldens.seed_by_name(KLAutoencoder(arch)).state_dict(), arch)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "diffusion_pytorch_model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
