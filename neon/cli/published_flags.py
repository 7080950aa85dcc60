"""What the published FAMILY/calculate_fid.py commands share: their common flags, the evaluation and its one JSON
object."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import click
import torch

import neon
from fid.features import open_extractor
from fid.metrics import MIN_PER_SPLIT, SPLITS, cautions, frechet_kind, metric_name
from fid.names import Metric
from fid.reference import check_made_with, read_reference
from neon import config_table, quantize
from neon.checkpoints import checkpoint
from neon.cli.located import STATISTICS
from neon.cli.messages import PlainCommand
from neon.cli.options import PATH, RANK_OPTIONS, Command, gathered
from neon.cli.resume import pass_folder
from neon.evaluation.evaluate import Evaluation, Yardstick, evaluate, spread, why_not_comparable
from neon.family import Family
from neon.runtime.distributed import World, world
from neon.runtime.interrupt import told_how_to_go_on
from neon.runtime.precision import Precision
from neon.runtime.progress import say
from neon.sampling import options
from neon.sampling.generate import Source
from neon.sampling.options import Labels
from neon.store import files, records

log = logging.getLogger(__name__)

published_command = partial(
    click.command,
    cls=PlainCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
)
"""Declares a FAMILY/calculate_fid.py."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What `common_options` gathers, the same for every family."""

    weights: str
    inception: Path | None
    extractor: str
    precision: Precision
    draw_on: Literal["cpu", "device"]
    repeats: int
    device: str | None
    timeout: float


common_options = gathered(
    Common,
    "common",
    [
        click.option("--weights", default="ema", help="Weight set of a file that holds several."),
        click.option(
            "--inception", type=PATH, help="Weights of the FID Inception.  [default: $NEON_CACHE or ~/.cache/neon]"
        ),
        click.option(
            "--extractor", default="inception-2015-12-05", help="Another feature network; the value is then no FID."
        ),
        click.option(
            "--precision",
            type=click.Choice(get_args(Precision)),
            default="fp32",
            help="fp32 is exact, the others faster.",
        ),
        click.option(
            "--draw_on",
            type=click.Choice(["cpu", "device"]),
            default="cpu",
            help="Where noise is drawn; cpu is the same everywhere.",
        ),
        click.option(
            "--repeats", type=click.IntRange(min=1), default=1, help="Disjoint seed blocks, one after the other."
        ),
        *RANK_OPTIONS,
    ],
)


@dataclass(frozen=True, kw_only=True)
class Images:
    """How many images, which, and what they are compared with: what `images_options` gathers."""

    num_images: int
    batch_size: int
    first_seed: int
    fid_stats: Path
    img_size: int | None = None
    """Side of the decoded images in pixels; a model that makes another size is refused before anything is sampled."""


def images_options(*, batch_size: int) -> Callable[[Command], Command]:
    """The published flags of all families but EDM, which has a spelling of its own."""
    return gathered(
        Images,
        "images",
        [
            click.option(
                "--num_images",
                "--N",
                type=click.IntRange(min=2),
                default=50_000,
                help="Images; image i has class i mod the classes.",
            ),
            click.option(
                "--batch_size",
                type=click.IntRange(min=1),
                default=batch_size,
                help="Images per network call and rank; changes speed and memory only.",
            ),
            click.option(
                "--img_size",
                type=int,
                help="Side of the images in pixels; checked against the model.  [default: the model's]",
            ),
            click.option(
                "--fid_stats", type=STATISTICS, required=True, help="Reference statistics (.npz with mu and sigma)."
            ),
            click.option("--seed", "first_seed", type=int, default=0, help="Image i has the seed SEED + i."),
        ],
    )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One evaluation of one checkpoint."""

    family: Family
    checkpoint: Path
    autoencoder: Path | None = None
    options: object
    """The family's sampling options."""
    uint8: quantize.Rule
    labels: Labels = "balanced"
    images: Images
    common: Common


def calculate_fid(request: Request) -> None:
    """Evaluate on all ranks and print one JSON object on rank 0."""
    with world(request.common.device, request.common.timeout) as ranks, told_how_to_go_on(ranks):
        yardstick = _yardstick(request, ranks)
        with pass_folder(ranks, yardstick.identity) as folder:
            result = _calculate(request, yardstick, folder, ranks)
        if ranks.is_main:
            click.echo(json.dumps(result))


def _calculate(request: Request, yardstick: Yardstick, folder: Path | None, ranks: World) -> dict[str, object]:
    found = checkpoint.read(request.checkpoint, weights=request.common.weights)
    request.family.open(request.autoencoder, ranks.device)
    model = request.family.load(found).to(ranks.device).eval().requires_grad_(False)
    sampling = options.Sampling(
        uint8=request.uint8,
        batch=request.images.batch_size,
        draw_on=request.common.draw_on,
        precision=request.common.precision,
        options=request.options,
    )
    _check_size(request, model)
    seeds = f"{request.images.num_images:,} images, seeds from {request.images.first_seed}"
    say(ranks, f"{seeds}, labels {request.labels}, {json.dumps(config_table.to_plain(sampling))}")
    runs: list[Evaluation] = []
    for repeat in range(request.common.repeats):
        block = Source(
            family=request.family,
            sampling=sampling,
            labels=request.labels,
            first_seed=request.images.first_seed + repeat * request.images.num_images,
            num_classes=request.family.num_classes(model),
        )
        desc = f"block {repeat + 1} of {request.common.repeats}"
        runs.append(_evaluation(block, model, request.images.num_images, yardstick, folder, ranks, desc))
    return _result(request, yardstick, found, sampling, runs, ranks)


def _evaluation(
    block: Source,
    model: torch.nn.Module,
    num_images: int,
    yardstick: Yardstick,
    folder: Path | None,
    ranks: World,
    desc: str,
) -> Evaluation:
    """One block of seeds: from `folder` if a killed command has finished it, half of it from there, or anew."""
    if folder is None:
        return evaluate(block, model, num_images, [yardstick], ranks, desc=desc)
    finished = ranks.broadcast(records.read_lines(folder / "blocks.jsonl") if ranks.is_main else [])
    for line in finished:
        if line["first_seed"] == block.first_seed:
            say(ranks, f"{desc}: found finished in {folder}")
            return Evaluation(line["metrics"], line["seconds"], num_images, None)
    partial = folder / f"seed-{block.first_seed}"
    found = evaluate(block, model, num_images, [yardstick], ranks, partial=partial, desc=desc)
    if ranks.is_main:
        line = {"first_seed": block.first_seed, "metrics": found.metrics, "seconds": found.seconds}
        records.append_line(folder / "blocks.jsonl", line)
    ranks.barrier()
    return found


def _yardstick(request: Request, ranks: World) -> Yardstick:
    """First of all, so that a missing reference or extractor is said before anything slow starts."""
    reference = read_reference(request.images.fid_stats)
    extractor = open_extractor(request.common.extractor, path=request.common.inception, device=ranks.device)
    check_made_with(reference, extractor)
    has_score = extractor.num_classes and request.images.num_images >= SPLITS * MIN_PER_SPLIT
    metrics: tuple[Metric, ...] = ("fid", "is") if has_score else ("fid",)
    return Yardstick(extractor=extractor, reference=reference, metrics=metrics)


def _check_size(request: Request, model: torch.nn.Module) -> None:
    if request.images.img_size is None:
        return
    made = request.family.img_size(model)
    if made != request.images.img_size:
        raise ValueError(
            f"--img_size {request.images.img_size}: {request.checkpoint} makes images of {made} x {made} pixels"
        )


def _result(
    request: Request,
    yardstick: Yardstick,
    found: checkpoint.Checkpoint,
    sampling: options.Sampling,
    runs: Sequence[Evaluation],
    ranks: World,
) -> dict[str, object]:
    metric = metric_name(frechet_kind(yardstick.extractor), request.images.num_images, yardstick.extractor.name)
    values = [run.metrics[metric] for run in runs]
    reason = why_not_comparable(yardstick, request.images.num_images)
    notes = cautions(
        runs[values.index(min(values))].metrics,
        num_images=request.images.num_images,
        extractor=yardstick.extractor,
        reference_images=None if yardstick.reference is None else yardstick.reference.count,
    )
    for note in notes:
        log.warning(note)
    seconds = {phase: math.fsum(run.seconds[phase] for run in runs) for phase in runs[0].seconds}
    result: dict[str, object] = {
        "metric": metric,
        "value": min(values),
        "comparable": reason is None,
        "reason": reason,
        "cautions": notes,
        "metrics": runs[values.index(min(values))].metrics,
        "num_images": request.images.num_images,
        "first_seed": request.images.first_seed,
        "labels": request.labels,
        "sampling": config_table.to_plain(sampling),
        "checkpoint": {"path": str(request.checkpoint), "weights": found.weights, "sha256": found.sha256},
        "autoencoder_sha256": None if request.autoencoder is None else files.sha256_of(request.autoencoder),
        "reference_sha256": yardstick.identity["reference_sha256"],
        "extractor_sha256": yardstick.extractor.sha256,
        "versions": {"neon": neon.__version__, "torch": torch.__version__},
        "device": str(ranks.device),
        "ranks": ranks.size,
        "seconds": seconds,
        "images_per_second": request.images.num_images * len(runs) / seconds["total"],
    }
    if len(runs) > 1:
        result["repeats"] = spread(values)
    return result
