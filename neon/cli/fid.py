"""`neon fid ref|calc|part|merge|compare`: the evaluator on images and statistics that lie on disk."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fid.names import METRICS
from neon.cli.options import PATH, RANK_OPTIONS, gathered

if TYPE_CHECKING:
    from fid.features import Extractor
    from fid.names import Metric
    from fid.reference import Reference
    from neon.evaluation.collect import Collected, Wanted
    from neon.images.image_set import ImageSet
    from neon.runtime.distributed import World

log = logging.getLogger(__name__)
DATA_HELP = "A folder, .zip, .npz, IDX file, a run's synth folder, or torchvision:NAME:SPLIT:FOLDER."


@click.group()
def fid() -> None:
    """Frechet distance (FID), Inception Score, KID, precision/recall, density and coverage of images on disk."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How features are extracted: what `extraction_options` gathers."""

    extractor: str
    inception: Path | None
    allow_unknown_weights: bool
    batch: int
    device: str | None
    timeout: float
    resume: Path | None

    def open(self, ranks: World) -> Extractor:
        from fid.features import open_extractor

        return open_extractor(
            self.extractor, path=self.inception, device=ranks.device, allow_unknown_weights=self.allow_unknown_weights
        )

    def pass_over(
        self, source: Path, chosen: range | None, wanted: Wanted, ranks: World, desc: str
    ) -> tuple[ImageSet, Collected]:
        from neon.evaluation.on_disk import pass_over

        return pass_over(source, chosen, wanted, self.batch, self.resume, ranks, desc)


extraction_options = gathered(
    Extraction,
    "how",
    [
        click.option(
            "--extractor",
            default="inception-2015-12-05",
            show_default=True,
            help="Feature network; also efficientnet-lite0, fashion-cnn, pixel-pca64 or 'module:attribute'.",
        ),
        click.option(
            "--inception", type=PATH, help="Weights of the extractor.  [default: $NEON_CACHE or ~/.cache/neon]"
        ),
        click.option(
            "--allow-unknown-weights", is_flag=True, help="Accept weights of another hash; the result is then no FID."
        ),
        click.option(
            "--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images per network call."
        ),
        *RANK_OPTIONS,
        click.option(
            "--resume",
            type=PATH,
            help="Keep the sums so far in this folder: the same command, killed, goes on from there.",
        ),
    ],
)


@fid.command()
@click.option("--data", "source", type=PATH, required=True, help=DATA_HELP)
@click.option("--out", type=PATH, required=True, help="The .npz to write (mu, sigma, count, provenance).")
@extraction_options
def ref(source: Path, out: Path, how: Extraction) -> None:
    """Make reference statistics of an image set, streaming: no feature matrix is kept.

    \b
    neon fid ref --data my_images.zip --out my_reference.npz
    """
    from fid.reference import write_reference
    from neon.evaluation.collect import Wanted
    from neon.evaluation.on_disk import describe_extractor, describe_source, versions
    from neon.runtime.distributed import world
    from neon.store import files

    with world(how.device, how.timeout) as ranks:
        network = how.open(ranks)
        images, found = how.pass_over(source, None, Wanted(extractor=network), ranks, "reference")
    if ranks.is_main:
        provenance = {
            **describe_source(source, images),
            "num_images": len(images),
            **describe_extractor(network),
            **versions(),
        }
        write_reference(out, found.collectors[0].moments, provenance)
        click.echo(json.dumps({"out": str(out), **provenance, "sha256": files.sha256_of(out)}))


@fid.command()
@click.option("--data", "source", type=PATH, required=True, help=DATA_HELP)
@click.option(
    "--images", "chosen", metavar="START:STOP", required=True, help="Which images, counted from 0, STOP excluded."
)
@click.option(
    "--out", type=PATH, required=True, help="The .safetensors file of sums to write; `neon fid merge` adds them up."
)
@extraction_options
def part(source: Path, chosen: str, out: Path, how: Extraction) -> None:
    """Sums over a part of an image set, so that several machines (or days) share the work.

    \b
    one machine:      neon fid part --data samples.zip --images 0:25000 --out a.safetensors
    another:          neon fid part --data samples.zip --images 25000:50000 --out b.safetensors
    either:           neon fid merge a.safetensors b.safetensors --out samples.npz
    """
    from fid.partial import Partial, write_partial
    from neon.evaluation.collect import Wanted
    from neon.evaluation.on_disk import describe_extractor, identity
    from neon.runtime.distributed import world

    with world(how.device, how.timeout) as ranks:
        network = how.open(ranks)
        span = parse_span(chosen)
        images, found = how.pass_over(source, span, Wanted(extractor=network), ranks, "part")
        which = identity(images, ranks)
    if ranks.is_main:
        moments, images_of = found.collectors[0].moments, ((span.start, span.stop),)
        write_partial(out, Partial(moments, network.name, network.sha256, which, images_of, len(images)))
        click.echo(
            json.dumps(
                {"out": str(out), "images": [span.start, span.stop], "of": len(images), **describe_extractor(network)}
            )
        )


def parse_span(text: str) -> range:
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal()):
        raise ValueError(f"--images {text}: expected START:STOP, for example 0:25000")
    return range(int(start), int(stop))


@fid.command("merge")
@click.argument("parts", nargs=-1, type=PATH, required=True)
@click.option("--out", type=PATH, required=True, help="The .npz to write.")
def merge_parts(parts: Sequence[Path], out: Path) -> None:
    """Add the sums of `neon fid part` up to statistics (.npz). An image that is in two parts is an error, so is a
    gap."""
    from fid.partial import merge_partials, read_partial
    from fid.reference import write_reference
    from neon.evaluation.on_disk import versions
    from neon.store import files

    total = merge_partials([read_partial(path) for path in parts])
    total.check_complete()
    provenance = {"source": total.source, "images": total.images[0], "num_images": total.moments.count}
    provenance |= {"extractor": total.extractor, "extractor_sha256": total.extractor_sha256, **versions()}
    write_reference(out, total.moments, provenance)
    click.echo(json.dumps({"out": str(out), **provenance, "sha256": files.sha256_of(out)}))


@fid.command()
@click.option("--data", "source", type=PATH, required=True, help=f"The generated images. {DATA_HELP}")
@click.option("--ref", "reference", type=PATH, required=True, help="Reference statistics (.npz).")
@click.option("--ref-data", type=PATH, help="Reference images, for kid, precision, recall, density and coverage.")
@click.option(
    "--metric",
    "metrics",
    type=click.Choice(METRICS),
    multiple=True,
    default=("fid",),
    show_default=True,
    help="Repeatable.",
)
@click.option(
    "--k",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Nearest neighbours of precision, recall, density, coverage (the paper: 5).",
)
@extraction_options
def calc(
    source: Path, reference: Path, ref_data: Path | None, metrics: Sequence[Metric], k: int, how: Extraction
) -> None:
    """Metrics of generated images against a reference, in one pass.

    \b
    neon fid calc --data samples/ --ref fid_stats/adm_in256_stats.npz --metric fid --metric is
    """
    from fid.evaluator import measure
    from fid.metrics import cautions
    from fid.reference import check_made_with, read_reference
    from neon.evaluation.collect import Wanted
    from neon.evaluation.evaluate import why_not_comparable
    from neon.evaluation.on_disk import describe_extractor, describe_source, versions
    from neon.runtime.distributed import world

    with world(how.device, how.timeout) as ranks:
        statistics = read_reference(reference)
        network = how.open(ranks)
        check_made_with(statistics, network)
        started = time.perf_counter()
        real = None
        if ref_data is not None:
            _, kept = how.pass_over(ref_data, None, Wanted(extractor=network, metrics=("kid",)), ranks, "reference")
            real = kept.collectors[0].features
        reference_s = time.perf_counter() - started
        images, found = how.pass_over(source, None, Wanted(extractor=network, metrics=metrics), ranks, "features")
    if not ranks.is_main:  # nobody waits for what one rank does alone
        return
    values = measure(metrics, generated=found.collectors[0], reference=statistics, reference_features=real, k=k)
    total_s = time.perf_counter() - started
    seconds = {"reference": reference_s, "reading": found.source_s, "features": found.feature_s, "total": total_s}
    reason = why_not_comparable(Wanted(extractor=network), len(images))
    notes = cautions(values, num_images=len(images), extractor=network)
    for note in notes:
        log.warning(note)
    result = {
        "metrics": values,
        "num_images": len(images),
        "comparable": reason is None,
        "reason": reason,
        "cautions": notes,
        "k": k,
        "seconds": seconds,
    }
    result |= {
        "images_per_second": len(images) / max(found.source_s + found.feature_s, 1e-9),
        **describe_source(source, images),
    }
    result |= {
        "reference_sha256": statistics.sha256,
        **describe_extractor(network),
        "ranks": ranks.size,
        "device": str(ranks.device),
    }
    click.echo(json.dumps({**result, "versions": versions()}))


@fid.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
def compare(a: Path, b: Path) -> None:
    """Frechet distance of two statistics files."""
    from fid.frechet import frechet_distance
    from fid.reference import read_reference

    first, second = read_reference(a), read_reference(b)
    one, other = made_with(first), made_with(second)
    if any(x and y and x != y for x, y in zip(one, other, strict=True)):
        raise ValueError(
            f"{a} was made with {' '.join(filter(None, one))}, {b} with {' '.join(filter(None, other))}: their "
            "distance means nothing"
        )
    value = frechet_distance(generated=first, reference=second)
    click.echo(
        json.dumps(
            {
                "frechet_distance": value,
                "a_sha256": first.sha256,
                "b_sha256": second.sha256,
                "counts": [first.count, second.count],
            }
        )
    )


def made_with(reference: Reference) -> tuple[str | None, str | None]:
    """Name and weights' hash of the extractor, as far as the file records them."""
    sha256 = reference.provenance.get("extractor_sha256")
    return reference.extractor, None if sha256 is None else str(sha256)[:16]
