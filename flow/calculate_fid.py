"""FID of a flow-matching checkpoint. The names of the solver's flags are those of TorchCFM's evaluation.

    torchrun --standalone --nproc_per_node=8 flow/calculate_fid.py \\
        --model_ckpt checkpoints/otcfm_cifar10_weights_step_400000.pt --num_images 50000 --batch_size 1024 \\
        --fid_stats fid_stats/cifar10-32x32.npz

Runs as plain `python` too, and on a CPU. The numbers do not depend on the number of ranks or the batch size.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Python has put this file's folder on its path, where the folder above belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import get_args

import click

from flow.family import Flow
from flow.options import ErrorNorm, Sampling, Solver
from flow.presets import EULER_STEPS
from neon import quantize
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
@click.option("--model_ckpt", type=FILE, required=True, help="Weights: TorchCFM's .pt, or our safetensors.")
@click.option(
    "--integration_method", type=click.Choice(get_args(Solver)), default="dopri5", help="Adaptive, or equal steps."
)
@click.option(
    "--integration_steps",
    type=click.IntRange(min=1),
    help=f"Steps of euler; dopri5 has none.  [default for euler: {EULER_STEPS}]",
)
@click.option("--tol", type=float, default=Sampling.tol, help="Relative and absolute tolerance of dopri5.")
@click.option(
    "--error_norm",
    type=click.Choice(get_args(ErrorNorm)),
    default="image",
    help="dopri5's error of each image, or of the batch; published: batch, where images depend on batches and ranks.",
)
@click.option("--uint8", type=click.Choice(quantize.RULES), default="edm", help="Rounding; published: edm.")
@images_options(batch_size=1024)
@common_options
def main(
    model_ckpt: Path,
    integration_method: Solver,
    integration_steps: int | None,
    tol: float,
    error_norm: ErrorNorm,
    uint8: quantize.Rule,
    images: Images,
    common: Common,
) -> None:
    """FID of a flow-matching checkpoint against reference statistics; the last line on stdout is one JSON object.

    \b
    torchrun --standalone --nproc_per_node=8 flow/calculate_fid.py \\
        --model_ckpt checkpoints/otcfm_cifar10_weights_step_400000.pt --num_images 50000 --batch_size 1024 \\
        --fid_stats fid_stats/cifar10-32x32.npz

    TorchCFM drew its images without a seed, so published values are not reproduced bit for bit.
    """
    if integration_method == "euler" and integration_steps is None:
        integration_steps = EULER_STEPS
    with as_flags(Sampling, solver="--integration_method", num_steps="--integration_steps"):
        options = Sampling(solver=integration_method, num_steps=integration_steps, tol=tol, error_norm=error_norm)
    calculate_fid(
        Request(
            family=Flow(),
            checkpoint=model_ckpt,
            options=options,
            uint8=uint8,
            images=images,
            common=common,
        )
    )


if __name__ == "__main__":
    main()
