"""`neon fid ref|calc|compare|info`: the evaluator on images and statistics that lie on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch

import neon
from fid.evaluator import Collector, Metric, measure
from fid.features import Extractor, open_extractor
from fid.frechet import frechet_distance
from fid.metrics import cautions
from fid.reference import read_reference, write_reference
from neon import checkpoint, files
from neon.data import ImageSet, open_images
from neon.distributed import World, world
from neon.evaluate import Yardstick, why_not_comparable
from neon.progress import progress

PATH = click.Path(path_type=Path)
METRICS = ("fid", "fid_inf", "is", "kid", "precision", "recall", "density", "coverage")


@click.group()
def fid() -> None:
    """Frechet distance (FID), Inception Score, KID, precision/recall, density and coverage of images on disk."""


def extractor_options(command: Callable) -> Callable:
    for option in reversed(
        [
            click.option(
                "--extractor",
                default="inception-2015-12-05",
                show_default=True,
                help="Feature network; also efficientnet-lite0, fashion-cnn, pixel-pca64 or 'module:attribute'.",
            ),
            click.option("--inception", type=PATH, help="Weights of the extractor.  [default: $NEON_CACHE or ~/.cache/neon]"),
            click.option("--allow-unknown-weights", is_flag=True, help="Accept weights of another hash; the result is then no FID."),
            click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images per network call."),
            click.option("--device", help="cpu, cuda, cuda:1 or mps.  [default: CUDA if there is one]"),
        ]
    ):
        command = option(command)
    return command


def collect(
    source: Path, extractor: Extractor, metrics: Sequence[Metric], batch: int, ranks: World, desc: str
) -> tuple[ImageSet, Collector]:
    """One pass over an image set. Warns of lossy formats; unreadable files are an error that names and counts them."""
    images = open_images(source, use_labels=False)
    if len(images) < 2:
        raise ValueError(f"{source}: a covariance needs at least 2 images, found {len(images)}")
    if images.is_lossy:
        click.echo(f"warning: {source} holds files of a lossy format (jpg, webp): its artefacts change the value", err=True)
    collector = Collector(extractor, len(images), metrics)
    bar = progress(total=len(images), desc=desc, unit="img", world=ranks)
    done = 0
    for part in images.batches(batch):
        collector.update(part, range(done, done + len(part)))
        done += len(part)
        bar.update(len(part))
    bar.close()
    return images, collector


@fid.command()
@click.option("--data", "source", type=PATH, required=True, help="Folder, .zip, .npz, IDX file or a run's synth folder.")
@click.option("--out", type=PATH, required=True, help="The .npz to write (mu, sigma, count, provenance).")
@extractor_options
def ref(
    source: Path, out: Path, extractor: str, inception: Path | None, allow_unknown_weights: bool, batch: int, device: str | None
) -> None:
    """Make reference statistics of an image set, streaming: no feature matrix is kept.

    \b
    neon fid ref --data my_images.zip --out my_reference.npz
    """
    with world(device) as ranks:
        network = open_extractor(extractor, path=inception, device=ranks.device, allow_unknown_weights=allow_unknown_weights)
        images, collector = collect(source, network, ("fid",), batch, ranks, "reference")
        provenance = {
            "source": source.name,
            "source_sha256": None if source.is_dir() else files.sha256_of(source),
            "num_images": len(images),
            "image_shape": list(images.shape),
            "extractor": network.name,
            "extractor_sha256": network.sha256,
            "resize": "tf1-bilinear-299" if network.comparable is None else "the extractor's own",
            "neon": neon.__version__,
            "torch": torch.__version__,
        }
        write_reference(out, collector.moments, provenance)
    click.echo(json.dumps({"out": str(out), **provenance, "sha256": files.sha256_of(out)}))


@fid.command()
@click.option("--data", "source", type=PATH, required=True, help="The generated images.")
@click.option("--ref", "reference", type=PATH, required=True, help="Reference statistics (.npz).")
@click.option("--ref-data", type=PATH, help="Reference images, for kid, precision, recall, density and coverage.")
@click.option("--metric", "metrics", type=click.Choice(METRICS), multiple=True, default=("fid",), show_default=True, help="Repeatable.")
@click.option(
    "--k",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Nearest neighbours of precision, recall, density, coverage (the paper: 5).",
)
@extractor_options
def calc(
    source: Path,
    reference: Path,
    ref_data: Path | None,
    metrics: Sequence[Metric],
    k: int,
    extractor: str,
    inception: Path | None,
    allow_unknown_weights: bool,
    batch: int,
    device: str | None,
) -> None:
    """Metrics of generated images against a reference, in one pass.

    \b
    neon fid calc --data samples/ --ref fid_stats/adm_in256_stats.npz --metric fid --metric is
    """
    with world(device) as ranks:
        statistics = read_reference(reference)
        network = open_extractor(extractor, path=inception, device=ranks.device, allow_unknown_weights=allow_unknown_weights)
        yardstick = Yardstick(extractor=network, reference=statistics, metrics=metrics, k=k)
        real = None if ref_data is None else collect(ref_data, network, ("kid",), batch, ranks, "reference")[1].features
        images, collector = collect(source, network, metrics, batch, ranks, "features")
        values = measure(metrics, generated=collector, reference=statistics, reference_features=real, k=k)
    reason = why_not_comparable(yardstick, len(images))
    distance = next((value for name, value in values.items() if name.startswith(("fid", "fd"))), None)
    for note in cautions(distance, num_images=len(images), dim=network.dim) if distance is not None else []:
        click.echo(f"warning: {note}", err=True)
    result = {"metrics": values, "num_images": len(images), "comparable": reason is None, "reason": reason}
    hashes = {"reference_sha256": statistics.sha256, "extractor": network.name, "extractor_sha256": network.sha256}
    click.echo(json.dumps({**result, **hashes, "versions": {"neon": neon.__version__, "torch": torch.__version__}}))


@fid.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
def compare(a: Path, b: Path) -> None:
    """Frechet distance of two statistics files."""
    first, second = read_reference(a), read_reference(b)
    if first.extractor and second.extractor and first.extractor != second.extractor:
        raise ValueError(f"{a} was made with {first.extractor}, {b} with {second.extractor}: their distance means nothing")
    value = frechet_distance(generated=first, reference=second)
    click.echo(
        json.dumps({"frechet_distance": value, "a_sha256": first.sha256, "b_sha256": second.sha256, "counts": [first.count, second.count]})
    )


@fid.command("info")
@click.argument("file", type=PATH)
def fid_info(file: Path) -> None:
    """What a statistics file holds: keys, shapes, number of images if known, provenance, hash."""
    click.echo(json.dumps(checkpoint.describe(file)))


commands: Sequence[click.Command] = (fid,)
