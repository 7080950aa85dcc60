"""FID of an xAR checkpoint, by the published command.

    torchrun --standalone --nproc_per_node=8 xar/calculate_fid.py --model xar_large \\
        --model_ckpt checkpoints/Neon_xARL_imagenet256.pth --cfg 2.7 --flow_steps 50 \\
        --vae_path xar/pretrained/kl16.ckpt --num_images 50000 --batch_size 64 --img_size 256 \\
        --fid_stats fid_stats/adm_in256_stats.npz

Runs as plain `python` too, and on a CPU. The numbers do not depend on the number of ranks or the batch size. Images
stay in memory: no folder is written or deleted.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Python has put this file's folder on its path, where the folder above belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import click

from neon import config_table, quantize
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
from xar.family import XAR
from xar.options import Sampling
from xar.presets import CFG_SCALE, NUM_STEPS, SIZES, Protocol
from xar.transformer import XARArch


@published_command()
@click.option(
    "--model", type=click.Choice(list(SIZES)), help="Checked against the file.  [default: what the file holds]"
)
@click.option("--model_ckpt", type=FILE, required=True, help="xAR weights: a published .pth, or our safetensors.")
@click.option(
    "--vae_path",
    type=FILE,
    default=Path("xar/pretrained/kl16.ckpt"),
    help="The KL-16 autoencoder (download_models.sh --models).",
)
@click.option(
    "--cfg",
    type=float,
    help="Guidance of the last cell.  [default: 3.8 for xar_base, 2.7 for xar_large; see --protocol]",
)
@click.option("--flow_steps", type=int, help="Steps per cell.  [default: 40 for xar_base, 50 for the others]")
@click.option(
    "--protocol",
    type=click.Choice(["neon", "base"]),
    default="neon",
    help="Whose guidance is the default. base: 2.7 (xar_base), 2.3 (xar_large), 2.2 (xar_huge), for base models only.",
)
@click.option("--uint8", type=click.Choice(quantize.RULES), default="truncate", help="Rounding; published: truncate.")
@images_options(batch_size=64)
@common_options
def main(
    model: str | None,
    model_ckpt: Path,
    vae_path: Path,
    cfg: float | None,
    flow_steps: int | None,
    protocol: Protocol,
    uint8: quantize.Rule,
    images: Images,
    common: Common,
) -> None:
    """FID of an xAR checkpoint against reference statistics; the last line on stdout is one JSON object.

    \b
    torchrun --standalone --nproc_per_node=8 xar/calculate_fid.py --model xar_large \\
        --model_ckpt checkpoints/Neon_xARL_imagenet256.pth --cfg 2.7 --flow_steps 50 \\
        --vae_path xar/pretrained/kl16.ckpt --num_images 50000 --batch_size 64 --img_size 256 \\
        --fid_stats fid_stats/adm_in256_stats.npz

    The authors sampled with --precision fp16.
    """
    options = options_of(size_of(model_ckpt, common.weights, model), protocol, cfg, flow_steps)
    calculate_fid(
        Request(
            family=XAR(),
            checkpoint=model_ckpt,
            autoencoder=vae_path,
            options=options,
            uint8=uint8,
            images=images,
            common=common,
        )
    )


def size_of(path: Path, weights: str, expected: str | None) -> str | None:
    """The published size that the file holds, None for one of your own. Raises ValueError if it is not the expected
    one."""
    try:
        arch = config_table.build(XARArch, XAR().arch_of(checkpoint.read(path, weights=weights)), "arch")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    found = next((name for name, size in SIZES.items() if size == arch), None)
    if expected is not None and found != expected:
        raise ValueError(
            f"--model {expected}: {path} holds {found or arch}; leave the option away or name another file"
        )
    return found


def options_of(size: str | None, protocol: Protocol, cfg: float | None, flow_steps: int | None) -> Sampling:
    """What was asked for, completed by what is published for this size."""
    cfg = CFG_SCALE[protocol].get(size or "") if cfg is None else cfg
    num_steps = NUM_STEPS.get(size or "") if flow_steps is None else flow_steps
    if cfg is None:
        raise ValueError(
            f"no {protocol} guidance is published for {size or 'a model of this size'}; name it with --cfg"
        )
    if num_steps is None:
        raise ValueError("no number of steps is published for a model of this size; name it with --flow_steps")
    with as_flags(Sampling, num_steps="--flow_steps", cfg_scale="--cfg"):
        return Sampling(num_steps=num_steps, cfg_scale=cfg)


if __name__ == "__main__":
    main()
