"""Which file holds a Stable Diffusion autoencoder, and how it is read."""

from __future__ import annotations

import json
from pathlib import Path

from imm.vae import SD_VAE, StabilityEncoder, from_diffusers, layout_from_diffusers
from neon.checkpoints import checkpoint
from neon.networks.autoencoder import ConvLayout, KLAutoencoder

FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def autoencoder_file(path: Path) -> Path:
    """The weights file of an autoencoder: `path` itself, or the one in a folder (or its `vae/`) laid out as on the Hub.

    Raises FileNotFoundError naming what was looked for.
    """
    if path.is_file():
        return path
    candidates = [folder / name for folder in (path, path / "vae") for name in FILES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no autoencoder at {path}: expected a weights file or a folder that holds {' or '.join(FILES)}, as "
        "stabilityai/sd-vae-ft-ema has"
    )


def read_autoencoder(path: Path) -> StabilityEncoder:
    """The SD autoencoder with IMM's latent normalisation, from a file or folder in diffusers' names (current or
    legacy).

    The layout comes from the `config.json` beside the weights; without one it is that of stabilityai/sd-vae-ft-ema.
    """
    file = autoencoder_file(path)
    layout = _layout(file.with_name("config.json"))
    found = checkpoint.read(file, weights="any")
    tensors = from_diffusers(dict(found.tensors), layout)
    vae = checkpoint.Checkpoint(tensors, None, "imm", found.weights, file).filled(KLAutoencoder, layout)
    return StabilityEncoder(vae).eval().requires_grad_(False)


def _layout(config: Path) -> ConvLayout:
    if not config.is_file():
        return SD_VAE
    described = json.loads(config.read_text())
    if described.get("_class_name") != "AutoencoderKL":
        raise ValueError(
            f"{config}: describes a {described.get('_class_name')!r}, expected an 'AutoencoderKL' beside its weights"
        )
    return layout_from_diffusers(described)
