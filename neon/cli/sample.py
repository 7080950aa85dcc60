"""`neon sample`: look at what a checkpoint makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from neon.cli.options import PATH

if TYPE_CHECKING:
    from neon.quantize import Rule


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--num-images", type=click.IntRange(min=1), default=64, show_default=True, help="How many.")
@click.option(
    "--out",
    type=PATH,
    required=True,
    help="A new folder for PNG files, or a new .zip (a training set with labels); what is there is never replaced.",
)
@click.option("--family", help="Family of the checkpoint; module:Class of your own.  [default: what the file says]")
@click.option("--autoencoder", type=PATH, help="Autoencoder of a latent or token family.")
@click.option("--weights", default="auto", show_default=True, help="Weight set: ema, raw, or its place in the file.")
@click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Image i has seed + i.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images per network call.")
@click.option("--set", "values", multiple=True, metavar="KEY=VALUE", help="A sampling option, repeatable: cfg_scale=2.")
@click.option("--uint8", type=click.Choice(["edm", "truncate", "round"]), help="Rounding.  [default: the file's]")
@click.option("--device", help="cpu, cuda, cuda:1 or mps.  [default: CUDA if there is one]")
def sample(
    checkpoint: Path,
    num_images: int,
    out: Path,
    family: str | None,
    autoencoder: Path | None,
    weights: str,
    first_seed: int,
    batch: int,
    values: tuple[str, ...],
    uint8: Rule | None,
    device: str | None,
) -> None:
    """Sample images of a checkpoint of any family into a folder or a .zip.

    The neon.safetensors of a run says which sampling options its w was chosen for: they are used where --set names no
    others.

    \b
    neon sample checkpoints/Neon_EDM_FFHQ.pkl --num-images 64 --set num_steps=40 --out ffhq
    neon sample runs/mine/neon.safetensors --family mine:Mine --out mine.zip
    """
    from neon.pipeline.experiment import parse_value
    from neon.pipeline.sample import Request
    from neon.pipeline.sample import sample as sampled
    from neon.runtime.distributed import world

    options: dict[str, object] = {}
    for value in values:
        key, separator, text = value.partition("=")
        if not (separator and key.isidentifier()):
            raise click.UsageError(f"--set {value}: expected KEY=VALUE, for example num_steps=18")
        options[key] = parse_value(key, text)
    request = Request(
        checkpoint=checkpoint,
        weights=weights,
        family=family,
        autoencoder=autoencoder,
        num_images=num_images,
        first_seed=first_seed,
        batch=batch,
        options=options,
        uint8=uint8,
        out=out,
    )
    with world(device) as ranks:
        click.echo(json.dumps(sampled(request, ranks)))
