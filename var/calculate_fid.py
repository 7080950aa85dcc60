"""FID of a VAR checkpoint, by the published command.

    torchrun --standalone --nproc_per_node=8 var/calculate_fid.py --var_ckpt checkpoints/Neon_VARd16_imagenet256.pth \\
        --num_images 50000 --batch_size 64 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz

Runs as plain `python` too, and on a CPU. The numbers do not depend on the number of ranks or the batch size.
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
from var.family import VAR
from var.options import Sampling
from var.presets import CFG_SCALE, PATCH_NUMS, TOP_K, TOP_P, Protocol
from var.transformer import VARArch


@published_command()
@click.option(
    "--var_ckpt", type=FILE, required=True, help="VAR weights: a published .pth of any depth, or our safetensors."
)
@click.option("--model_depth", type=int, help="Checked against the model.  [default: the model's]")
@click.option(
    "--vae_ckpt",
    type=FILE,
    default=Path("checkpoints/vae_ch160v4096z32.pth"),
    help="The VQ-VAE (download_models.sh --models).",
)
@click.option(
    "--cfg", type=float, help="Guidance.  [default: 2.8 at 256 and 3.2 at 512 px; 1.5 and 2.0 with --protocol base]"
)
@click.option("--top_k", type=int, default=TOP_K, help="Draw from the k likeliest tokens; 0: all.")
@click.option(
    "--top_p", type=float, default=TOP_P, help="... and of those from the likeliest with this probability; 0: all."
)
@click.option(
    "--more_smooth", is_flag=True, help="Average codes instead of drawing them: prettier pictures, not for numbers."
)
@click.option("--protocol", type=click.Choice(["neon", "base"]), default="neon", help="Whose guidance is the default.")
@click.option("--uint8", type=click.Choice(quantize.RULES), default="truncate", help="Rounding; published: truncate.")
@images_options(batch_size=64)
@common_options
def main(
    var_ckpt: Path,
    model_depth: int | None,
    vae_ckpt: Path,
    cfg: float | None,
    top_k: int,
    top_p: float,
    more_smooth: bool,
    protocol: Protocol,
    uint8: quantize.Rule,
    images: Images,
    common: Common,
) -> None:
    """FID of a VAR checkpoint against reference statistics; the last line on stdout is one JSON object.

    \b
    torchrun --standalone --nproc_per_node=8 var/calculate_fid.py --var_ckpt checkpoints/Neon_VARd16_imagenet256.pth \\
        --num_images 50000 --batch_size 64 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz

    The authors sampled with --precision fp16.
    """
    arch = arch_of(var_ckpt, common.weights, model_depth)
    scale = default_cfg(arch, protocol) if cfg is None else cfg
    with as_flags(Sampling, cfg_scale="--cfg"):
        options = Sampling(cfg_scale=scale, top_k=top_k, top_p=top_p, more_smooth=more_smooth)
    calculate_fid(
        Request(
            family=VAR(),
            checkpoint=var_ckpt,
            autoencoder=vae_ckpt,
            options=options,
            uint8=uint8,
            images=images,
            common=common,
        )
    )


def arch_of(path: Path, weights: str, depth: int | None) -> VARArch:
    """What the file holds. Raises ValueError if that is not a VAR, or one of another depth."""
    found = checkpoint.read(path, weights=weights)
    try:
        arch = config_table.build(VARArch, VAR().arch_of(found), "arch")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if depth is not None and depth != arch.depth:
        raise ValueError(
            f"--model_depth {depth}: {path} holds a VAR of depth {arch.depth}; leave the option away or name "
            "another file"
        )
    return arch


def default_cfg(arch: VARArch, protocol: Protocol) -> float:
    """The published guidance at the resolution of these scales."""
    for side, scale in CFG_SCALE[protocol].items():
        if PATCH_NUMS[side] == arch.patch_nums:
            return scale
    raise ValueError(
        f"nothing is published for a VAR with patch_nums {list(arch.patch_nums)}; name its guidance with --cfg"
    )


if __name__ == "__main__":
    main()
