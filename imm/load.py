"""Reading IMM's files: networks by the constructor arguments that they hold, autoencoders as diffusers stores them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from imm.diffusers_names import from_diffusers
from imm.encoders import StabilityEncoder
from imm.precond import IMMPrecond
from imm.presets import SD_VAE
from neon.checkpoints import checkpoint
from neon.checkpoints.limits import shown
from neon.config_table import construct
from neon.networks.autoencoder import ConvArch, KLAutoencoder

FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def precond(arch: Mapping[str, object]) -> IMMPrecond:
    """A freshly initialised network. arch: the arguments of IMMPrecond, perhaps with its `class_name`. Raises
    ValueError if they do not fit."""
    class_name = arch.get("class_name", "IMMPrecond")
    if class_name != "IMMPrecond":
        raise ValueError(
            f"arch.class_name: the imm family builds IMMPrecond, the checkpoint holds a {shown(class_name)}"
        )
    return construct(IMMPrecond, {name: value for name, value in arch.items() if name != "class_name"}, "arch")


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

    The sizes come from the `config.json` beside the weights; without one they are those of stabilityai/sd-vae-ft-ema.
    """
    file = autoencoder_file(path)
    arch = _arch(file.with_name("config.json"))
    found = checkpoint.read(file, weights="any")
    tensors = from_diffusers(dict(found.tensors), arch)
    vae = checkpoint.Checkpoint(tensors, None, "imm", found.weights, file).filled(KLAutoencoder, arch)
    return StabilityEncoder(vae).eval().requires_grad_(False)


def _arch(config: Path) -> ConvArch:
    if not config.is_file():
        return SD_VAE
    described = json.loads(config.read_text())
    if described.get("_class_name") != "AutoencoderKL":
        raise ValueError(
            f"{config}: describes a {described.get('_class_name')!r}, expected an 'AutoencoderKL' beside its weights"
        )
    return arch_from_diffusers(described)


def arch_from_diffusers(config: Mapping[str, object]) -> ConvArch:
    """The sizes in a diffusers `config.json` of an AutoencoderKL. Raises ValueError for block types that are not
    plain."""
    for key, plain in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        kinds = config.get(key, [])
        if not isinstance(kinds, Sequence) or set(kinds) - {plain}:
            raise ValueError(f"{key}: expected only {plain!r}, found {kinds!r}")
    widths = config.get("block_out_channels")
    if not isinstance(widths, Sequence) or any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels: expected a list of multiples of its first entry, found {widths!r}")
    return ConvArch(
        ch=widths[0],
        ch_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=_number(config, "layers_per_block"),
        z_channels=_number(config, "latent_channels"),
        image_channels=_number(config, "in_channels"),
        num_groups=_number(config, "norm_num_groups"),
        has_moments=True,
    )


def _number(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ValueError(f"{key}: expected a whole number, found {value!r}")
    return value
