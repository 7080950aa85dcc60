"""FID of an EDM checkpoint, by the published command.

    torchrun --standalone --nproc_per_node=8 edm/calculate_fid.py --network_pkl checkpoints/Neon_EDM_FFHQ.pkl \\
        --ref fid_stats/ffhq-64x64.npz --seeds 0-49999 --max_batch_size 256 --num_steps 40

Runs as plain `python` too, and on a CPU. The numbers do not depend on the number of ranks or the batch size.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Python has put this file's folder on its path, where the folder above belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import click

from edm.family import EDM
from edm.guidance import GuidedEDM
from edm.options import Sampling
from neon import quantize
from neon.cli.located import FILE, STATISTICS
from neon.cli.messages import as_flags
from neon.cli.published_flags import (
    Common,
    Images,
    Request,
    calculate_fid,
    common_options,
    published_command,
)


class Seeds(click.ParamType):
    """One unbroken block of seeds, "FIRST-LAST" (inclusive), as a range."""

    name = "FIRST-LAST"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> range:
        if isinstance(value, range):
            return value
        first, dash, last = str(value).partition("-")
        if not (dash and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            self.fail(
                f"{value!r}: expected one block of at least two seeds, FIRST-LAST with FIRST < LAST, for "
                "example 0-49999",
                param,
                ctx,
            )
        return range(int(first), int(last) + 1)


@published_command()
@click.option("--network_pkl", type=FILE, required=True, help="EDM weights: a published .pkl or our safetensors.")
@click.option("--ref", type=STATISTICS, required=True, help="Reference statistics (.npz with mu and sigma).")
@click.option(
    "--seeds", type=Seeds(), default="0-49999", help="One image per seed; the class of an image is drawn from its seed."
)
@click.option(
    "--max_batch_size",
    type=click.IntRange(min=1),
    default=256,
    help="Images per network call and rank; changes speed and memory only.",
)
@click.option(
    "--num_steps", type=click.IntRange(min=2), default=18, help="Solver steps: 18 at 32 x 32 pixels, 40 at 64 x 64."
)
@click.option("--sigma_min", type=float, default=Sampling.sigma_min, help="Smallest noise level.")
@click.option("--sigma_max", type=float, default=Sampling.sigma_max, help="Largest noise level.")
@click.option("--rho", type=float, default=Sampling.rho, help="Exponent of the noise levels.")
@click.option(
    "--S_churn", "s_churn", type=float, default=0.0, help="Noise added and removed along the way; 0 is deterministic."
)
@click.option("--S_min", "s_min", type=float, default=0.0, help="Churn only noise levels above.")
@click.option("--S_max", "s_max", type=float, default=float("inf"), help="Churn only noise levels below.")
@click.option("--S_noise", "s_noise", type=float, default=1.0, help="Standard deviation of the churned noise.")
@click.option(
    "--guide", type=FILE, help="A second model, say the self-trained one, for negative guidance: (1 + g) D - g D_guide."
)
@click.option(
    "--guidance", type=float, default=1.0, help="g; with --guide only. Costs two network calls instead of one."
)
@click.option("--uint8", type=click.Choice(quantize.RULES), default="edm", help="Rounding; published: edm.")
@common_options
def main(
    network_pkl: Path,
    ref: Path,
    seeds: range,
    max_batch_size: int,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    s_churn: float,
    s_min: float,
    s_max: float,
    s_noise: float,
    guide: Path | None,
    guidance: float,
    uint8: quantize.Rule,
    common: Common,
) -> None:
    """FID of an EDM checkpoint against reference statistics; the last line on stdout is one JSON object.

    \b
    torchrun --standalone --nproc_per_node=8 edm/calculate_fid.py \\
        --network_pkl checkpoints/Neon_EDM_conditional_CIFAR10.pkl --ref fid_stats/cifar10-32x32.npz \\
        --seeds 0-49999 --max_batch_size 256 --num_steps 18

    Published images were drawn on the GPU; --draw_on device repeats that stream.
    """
    with as_flags(Sampling):
        options = Sampling(
            num_steps=num_steps,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            rho=rho,
            S_churn=s_churn,
            S_min=s_min,
            S_max=s_max,
            S_noise=s_noise,
        )
    calculate_fid(
        Request(
            family=EDM() if guide is None else GuidedEDM(guide, guidance, weights=common.weights),
            checkpoint=network_pkl,
            options=options,
            uint8=uint8,
            labels="drawn",
            images=Images(num_images=len(seeds), batch_size=max_batch_size, first_seed=seeds.start, fid_stats=ref),
            common=common,
        )
    )


if __name__ == "__main__":
    main()
