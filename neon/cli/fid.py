"""`neon fid ref|calc|part|merge|compare`: the evaluator on images and statistics that lie on disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fid.names import METRICS
from neon.cli.located import STATISTICS
from neon.cli.options import PATH, RANK_OPTIONS, REPLACES, NewFile, gathered

if TYPE_CHECKING:
    from fid.features import Extractor
    from fid.names import Metric
    from fid.reference import Reference
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


extraction_options = gathered(
    Extraction,
    "how",
    [
        click.option(
            "--extractor",
            default="inception-2015-12-05",
            show_default=True,
            help="Feature network; also dinov2-vitl14, efficientnet-lite0, fashion-cnn, pixel-pca64, 'module:name'.",
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
            type=click.Path(path_type=Path, file_okay=False),
            help="Keep the sums so far in this folder: the same command, killed, goes on from there.",
        ),
    ],
)


@fid.command()
@click.option("--data", "source", type=PATH, required=True, help=DATA_HELP)
@click.option(
    "--out", type=NewFile(".npz"), required=True, help=f"The .npz to write (mu, sigma, count, provenance). {REPLACES}"
)
@extraction_options
def ref(source: Path, out: Path, how: Extraction) -> None:
    """Make reference statistics of an image set, streaming: no feature matrix is kept.

    \b
    neon fid ref --data my_images.zip --out my_reference.npz
    """
    from fid.reference import write_reference
    from neon.evaluation.collect import Wanted
    from neon.evaluation.on_disk import describe_extractor, describe_source, pass_over, versions
    from neon.images.formats import open_images
    from neon.runtime.distributed import world
    from neon.store import files

    files.check_writable(out, make_folder=True, inputs=[source])
    with world(how.device, how.timeout) as ranks:
        images = open_images(source, use_labels=False)
        network = how.open(ranks)
        found = pass_over(images, None, Wanted(extractor=network), how.batch, how.resume, ranks, "reference")
    if ranks.is_main:
        warn(images.remarks.sentences())
        provenance = {
            **describe_source(images),
            "num_images": len(images),
            **describe_extractor(network),
            **versions(),
        }
        write_reference(out, found.collectors[0].moments, provenance)
        said = {"cautions": images.remarks.sentences(), "sha256": files.sha256_of(out)}
        click.echo(json.dumps({"out": str(out), **provenance, **said}))


def warn(notes: Sequence[str]) -> None:
    for note in notes:
        log.warning(note)


@fid.command()
@click.option("--data", "source", type=PATH, required=True, help=DATA_HELP)
@click.option(
    "--images", "chosen", metavar="START:STOP", required=True, help="Which images, counted from 0, STOP excluded."
)
@click.option(
    "--out",
    type=NewFile(".safetensors"),
    required=True,
    help=f"The .safetensors file of sums to write; `neon fid merge` adds them up. {REPLACES}",
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
    from neon.evaluation.on_disk import describe_extractor, identity, pass_over
    from neon.images.formats import open_images
    from neon.runtime.distributed import world
    from neon.store import files

    span = parse_span(chosen)
    files.check_writable(out, inputs=[source])
    with world(how.device, how.timeout) as ranks:
        images = open_images(source, use_labels=False)
        network = how.open(ranks)
        found = pass_over(images, span, Wanted(extractor=network), how.batch, how.resume, ranks, "part")
        which = identity(images, ranks)
    if ranks.is_main:
        warn(images.remarks.sentences())
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
@click.option("--out", type=NewFile(".npz"), required=True, help=f"The .npz to write. {REPLACES}")
def merge_parts(parts: Sequence[Path], out: Path) -> None:
    """Add the sums of `neon fid part` up to statistics (.npz). An image that is in two parts is an error, so is a
    gap."""
    from fid.partial import merge_partials, read_partial
    from fid.reference import write_reference
    from neon.evaluation.on_disk import versions
    from neon.store import files

    files.check_writable(out, make_folder=True, inputs=parts)
    total = merge_partials([read_partial(path) for path in parts])
    total.check_complete()
    provenance = {"source": total.source, "images": total.images[0], "num_images": total.moments.count}
    provenance |= {"extractor": total.extractor, "extractor_sha256": total.extractor_sha256, **versions()}
    write_reference(out, total.moments, provenance)
    click.echo(json.dumps({"out": str(out), **provenance, "sha256": files.sha256_of(out)}))


@fid.command()
@click.option("--data", "source", type=PATH, required=True, help=f"The generated images. {DATA_HELP}")
@click.option(
    "--ref",
    "reference",
    type=STATISTICS,
    help="Reference statistics (.npz with mu and sigma), or reference images.  [needed unless only `is` is asked for]",
)
@click.option(
    "--ref-data",
    type=PATH,
    help="Reference images, where --ref holds statistics: for kid, precision, recall, density and coverage.",
)
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
@click.option(
    "--kid-subset",
    type=click.IntRange(min=2),
    default=1000,
    show_default=True,
    help="Images in every subset of a KID; another number than 1000 stands in the metric's name.",
)
@extraction_options
def calc(
    source: Path,
    reference: Path | None,
    ref_data: Path | None,
    metrics: Sequence[Metric],
    k: int,
    kid_subset: int,
    how: Extraction,
) -> None:
    """Metrics of generated images against a reference, in one pass.

    \b
    neon fid calc --data samples/ --ref fid_stats/adm_in256_stats.npz --metric fid --metric is
    neon fid calc --data samples/ --ref real.zip --metric fid --metric precision --metric recall
    """
    from fid.features import SHIPPED
    from fid.reference import Reference, check_name
    from neon.evaluation.compute import Question, compare, open_reference, open_side
    from neon.evaluation.on_disk import describe_extractor, describe_source, versions
    from neon.runtime.distributed import world

    question = Question(metrics=metrics, k=k, kid_subset=kid_subset, batch=how.batch, resume=how.resume)
    with world(how.device, how.timeout) as ranks:
        against = None if reference is None else open_reference(reference)
        images, real = open_side(source), None if ref_data is None else open_side(ref_data)
        if isinstance(against, Reference) and how.extractor in SHIPPED and not how.allow_unknown_weights:
            check_name(against, how.extractor)  # before weights are asked for that this reference has no use for
        network = how.open(ranks)
        found = compare(images, against, real, network, question, ranks)
    if found is None:
        return
    warn(found.cautions)
    result: dict[str, object] = {
        "metrics": found.metrics,
        "num_images": found.num_images,
        "comparable": found.reason is None,
        "reason": found.reason,
        "cautions": found.cautions,
        "k": k,
        "seconds": found.seconds,
        "images_per_second": len(images) / max(found.seconds["reading"] + found.seconds["features"], 1e-9),
        **describe_source(images),
        "reference_sha256": against.sha256 if isinstance(against, Reference) else None,
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


@fid.command()
@click.argument("pickled", type=PATH)
@click.option("--entry", default="fd_dinov2", show_default=True, help="Which statistics of the file.")
@click.option(
    "--extractor", default="dinov2-vitl14", show_default=True, help="Feature network that they were made with."
)
@click.option("--out", type=NewFile(".npz"), required=True, help=f"The .npz to write. {REPLACES}")
def convert(pickled: Path, entry: str, extractor: str, out: Path) -> None:
    """EDM2's pickled reference statistics as an .npz; nothing in the pickle is executed.

    \b
    neon fid convert img512.pkl --out img512_dinov2.npz
    neon fid convert img512.pkl --entry fid --extractor inception-2015-12-05 --out img512_fid.npz
    """
    import torch

    from fid.frechet import Gaussian
    from fid.reference import read_reference, write_gaussian
    from neon.checkpoints.pickled_statistics import read_statistics
    from neon.store import files

    mean, covariance = read_statistics(pickled, entry)
    provenance = {
        "extractor": extractor,
        "source": pickled.name,
        "source_sha256": files.sha256_of(pickled),
        "entry": entry,
    }
    write_gaussian(out, Gaussian(torch.from_numpy(mean), torch.from_numpy(covariance)), provenance)
    read_reference(out)  # that it is a covariance
    click.echo(json.dumps({"out": str(out), "dim": len(mean), **provenance, "sha256": files.sha256_of(out)}))


def made_with(reference: Reference) -> tuple[str | None, str | None]:
    """Name and weights' hash of the extractor, as far as the file records them."""
    sha256 = reference.provenance.get("extractor_sha256")
    return reference.extractor, None if sha256 is None else str(sha256)[:16]
