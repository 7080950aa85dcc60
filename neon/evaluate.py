"""Weights to numbers: sample, quantise, extract features, sum moments, all in memory. Only counts and sums travel, and the
features only if a metric needs every one of them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fid.evaluator import Collector, Metric, measure
from fid.features import Extractor
from fid.moments import Moments
from fid.reference import Reference
from neon import records
from neon.distributed import World
from neon.generate import Source, generate, to_images
from neon.progress import progress


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """An extractor, what its features are compared with, and the metrics that are wanted of it."""

    extractor: Extractor
    reference: Reference
    metrics: Sequence[Metric] = ("fid",)
    reference_features: Tensor | None = None
    """(M, dim) features of reference images; kid, precision, recall, density and coverage need them."""
    k: int = 3
    """Nearest neighbours of precision, recall, density and coverage."""


@dataclass(frozen=True)
class Evaluation:
    """What one set of weights scored. metrics: name (with N and extractor) -> value; shown: the first images, uint8."""

    metrics: dict[str, float]
    seconds: dict[str, float]
    num_images: int
    shown: Tensor | None


def evaluate(
    source: Source,
    model: nn.Module,
    num_images: int,
    yardsticks: Sequence[Yardstick],
    world: World,
    *,
    num_shown: int = 0,
    partial: Path | None = None,
    desc: str = "evaluate",
) -> Evaluation:
    """Every yardstick's metrics of `num_images` images, from one pass over them.

    partial: a folder in which every rank keeps its sums so far; a killed evaluation goes on from there and ends with the same
        number. The caller makes it unique to weights and protocol; it is removed at the end.
    Raises ValueError if not exactly num_images images were counted.
    """
    started = time.perf_counter()
    mine = None if partial is None else partial / f"rank-{world.rank}-of-{world.size}"
    if mine is not None:
        mine.mkdir(parents=True, exist_ok=True)
    collectors = [_collector(y, num_images, mine, i) for i, y in enumerate(yardsticks)]
    shown: dict[int, Tensor] = {}
    batches = world.batches(num_images, source.sampling.batch)
    saver = None if mine is None else records.Saver(mine / "state.pt")
    done = 0 if saver is None else _restore(saver.path, collectors, shown)
    feature_s = 0.0
    bar = progress(total=num_images, initial=done * source.sampling.batch * world.size, desc=desc, unit="img", world=world)
    for batch in generate(source, model, batches[done:], world.device):
        images = to_images(source, batch.codes)
        before = time.perf_counter()
        for collector in collectors:
            collector.update(images, batch.indices)
        feature_s += time.perf_counter() - before
        shown.update({i: image.cpu() for i, image in zip(batch.indices, images, strict=True) if i < num_shown})
        done += 1
        bar.update(len(batch.indices) * world.size)
        if saver is not None and saver.is_due:
            saver.save({"done": done, "collectors": [c.state() for c in collectors], "shown": shown})
    bar.close()
    sampling_s = time.perf_counter() - started - feature_s
    metrics: dict[str, float] = {}
    for yardstick, collector in zip(yardsticks, collectors, strict=True):
        _join(collector, world)
        metrics |= measure(
            yardstick.metrics,
            generated=collector,
            reference=yardstick.reference,
            reference_features=yardstick.reference_features,
            k=yardstick.k,
        )
    everywhere = {i: image for part in world.gather(shown) for i, image in part.items()} if num_shown else {}
    world.barrier()
    if partial is not None and world.is_main:
        shutil.rmtree(partial)
    total_s = time.perf_counter() - started
    seconds = {"sampling": sampling_s, "features": feature_s, "metrics": total_s - sampling_s - feature_s, "total": total_s}
    grid = torch.stack([everywhere[i] for i in sorted(everywhere)]) if everywhere else None
    return Evaluation(metrics, seconds, num_images, grid)


def _collector(yardstick: Yardstick, num_images: int, mine: Path | None, number: int) -> Collector:
    folder = None
    if mine is not None:
        folder = mine / f"features-{number}"
        folder.mkdir(exist_ok=True)
    return Collector(yardstick.extractor, num_images, yardstick.metrics, folder=folder)


def _restore(path: Path, collectors: list[Collector], shown: dict[int, Tensor]) -> int:
    """Put a killed evaluation's sums back; returns the number of batches that they hold."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    for collector, saved in zip(collectors, state["collectors"], strict=True):
        collector.load_state(saved)
    shown.update(state["shown"])
    return int(state["done"])


def _join(collector: Collector, world: World) -> None:
    """Make every rank's collector hold what all ranks collected."""
    if world.size == 1:
        return
    sums = collector.moments.tensors()
    world.sum(list(sums.values()))
    collector.moments = Moments.from_tensors(sums)
    for store in collector.stores.values():
        for rank, (indices, rows) in enumerate(world.gather(store.taken())):
            if rank != world.rank:
                store.put(indices.tolist(), rows)


def why_not_comparable(yardstick: Yardstick, num_images: int) -> str | None:
    """None if the number may stand beside published FIDs, else the reason why not."""
    if yardstick.extractor.comparable is not None:
        return yardstick.extractor.comparable
    if num_images != 50_000:
        return f"published FIDs use 50,000 images, this one {num_images:,}; fewer images give a larger value"
    return None
