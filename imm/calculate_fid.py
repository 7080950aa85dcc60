"""FID of an IMM checkpoint, by the published command.

    torchrun --standalone --nproc_per_node=8 imm/calculate_fid.py --model_ckpt checkpoints/Neon_imm_imagenet256.pkl \\
        --num_images 50000 --batch_size 64 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz

Runs as plain `python` too, and on a CPU. The numbers do not depend on the number of ranks or the batch size.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Python has put this file's folder on its path, where the folder above belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import click

from imm.family import IMM
from imm.load import autoencoder_file
from imm.options import Sampling
from imm.presets import CFG_SCALE, Protocol
from neon import quantize
from neon.checkpoints import checkpoint
from neon.cli.located import FILE
from neon.cli.messages import as_flags
from neon.cli.published_flags import (
    Common,
    Images,
    Request,
    calculate_fid,
    common_options,
    images_options,
    published_command,
)


@published_command()
@click.option("--model_ckpt", type=FILE, required=True, help="IMM weights: a published .pkl, or our safetensors.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=8, help="Steps of the pushforward sampler on the uniform grid."
)
@click.option(
    "--cfg_scale", type=float, help="Guidance.  [default: 1.8; 1.5 with --protocol base; 1 for an unconditional model]"
)
@click.option("--protocol", type=click.Choice(["neon", "base"]), default="neon", help="Whose guidance is the default.")
@click.option(
    "--vae",
    type=FILE,
    default=Path("checkpoints/sd-vae-ft-ema"),
    help="SD autoencoder, a file or a folder; unused by pixel models.",
)
@click.option(
    "--uint8", type=click.Choice(quantize.RULES), help="Rounding.  [default, published: truncate; edm for pixel models]"
)
@images_options(batch_size=64)
@common_options
def main(
    model_ckpt: Path,
    steps: int,
    cfg_scale: float | None,
    protocol: Protocol,
    vae: Path,
    uint8: quantize.Rule | None,
    images: Images,
    common: Common,
) -> None:
    """FID of an IMM checkpoint against reference statistics; the last line on stdout is one JSON object.

    \b
    torchrun --standalone --nproc_per_node=8 imm/calculate_fid.py --model_ckpt checkpoints/Neon_imm_imagenet256.pkl \\
        --num_images 50000 --batch_size 64 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz

    The authors sampled with the network in float32 (TF32) and the autoencoder in float16.
    """
    family = IMM()
    arch = family.arch_of(checkpoint.read(model_ckpt, weights=common.weights))
    is_pixel_space = arch.get("img_channels") in (1, 3)
    scale = (CFG_SCALE[protocol] if arch.get("label_dim") else 1.0) if cfg_scale is None else cfg_scale
    with as_flags(Sampling, num_steps="--steps"):
        options = Sampling(num_steps=steps, cfg_scale=scale)
    autoencoder = None if is_pixel_space else autoencoder_file(vae)
    calculate_fid(
        Request(
            family=family,
            checkpoint=model_ckpt,
            autoencoder=autoencoder,
            options=options,
            uint8=uint8 or ("edm" if is_pixel_space else "truncate"),
            images=images,
            common=common,
        )
    )


if __name__ == "__main__":
    main()
