"""Weights to numbers: sample, quantise, extract features, sum moments, all in memory. Only counts and sums travel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fid.features import Extractor
from fid.frechet import frechet_distance
from fid.metrics import metric_name
from fid.moments import Moments
from fid.reference import Reference
from neon import records
from neon.distributed import World
from neon.generate import Source, generate, to_images
from neon.progress import progress

SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class Yardstick:
    """An extractor with the reference statistics that its features are compared to."""

    extractor: Extractor
    reference: Reference


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
    """Frechet distances of `num_images` images to every yardstick's reference.

    partial: a path prefix under which every rank keeps its sums so far; a killed evaluation goes on from there and ends
    with the same number. The caller makes it unique to weights and protocol.
    Raises ValueError if the summed count is not num_images.
    """
    started = time.perf_counter()
    sums = [Moments(y.extractor.dim) for y in yardsticks]
    shown: dict[int, Tensor] = {}
    batches = world.batches(num_images, source.sampling.batch)
    mine = None if partial is None else partial.with_name(f"{partial.name}-{world.rank}-of-{world.size}.pt")
    done = _restore(mine, sums, shown)
    feature_s, saved_at = 0.0, time.monotonic()
    bar = progress(total=num_images, initial=min(done * source.sampling.batch, num_images), desc=desc, unit="img", world=world)
    for batch in generate(source, model, batches[done:], world.device):
        images = to_images(source, batch.codes)
        before = time.perf_counter()
        for moments, yardstick in zip(sums, yardsticks, strict=True):
            moments.update(yardstick.extractor(images).pool)
        feature_s += time.perf_counter() - before
        shown.update({i: image.cpu() for i, image in zip(batch.indices, images, strict=True) if i < num_shown})
        done += 1
        bar.update(len(batch.indices) * world.size)
        if mine is not None and time.monotonic() - saved_at > SAVE_EVERY_S:
            records.save_state({"done": done, "sums": [m.state() for m in sums], "shown": shown}, mine)
            saved_at = time.monotonic()
    bar.close()
    sampled_s = time.perf_counter() - started - feature_s
    metrics = {_name(y, num_images): _distance(moments, y, num_images, world) for moments, y in zip(sums, yardsticks, strict=True)}
    everywhere = {i: image for part in world.gather(shown) for i, image in part.items()} if num_shown else {}
    if mine is not None:
        mine.unlink(missing_ok=True)
    seconds = {"sampling": sampled_s, "features": feature_s, "total": time.perf_counter() - started}
    grid = torch.stack([everywhere[i] for i in sorted(everywhere)]) if everywhere else None
    return Evaluation(metrics, seconds, num_images, grid)


def _restore(path: Path | None, sums: list[Moments], shown: dict[int, Tensor]) -> int:
    """Put a killed evaluation's sums back; returns the number of batches that they hold."""
    if path is None or not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    for i, exact in enumerate(state["sums"]):
        sums[i] = Moments.from_state(exact)
    shown.update(state["shown"])
    return int(state["done"])


def _name(yardstick: Yardstick, num_images: int) -> str:
    kind = "fid" if yardstick.extractor.comparable is None else "fd"
    return metric_name(kind, num_images, yardstick.extractor.name)


def _distance(moments: Moments, yardstick: Yardstick, num_images: int, world: World) -> float:
    total = moments
    if world.size > 1:
        sums = moments.tensors()
        world.sum(list(sums.values()))
        total = Moments.from_tensors(sums)
    if total.count != num_images:
        raise ValueError(f"{total.count} images were counted, expected {num_images}; the result is not used")
    return frechet_distance(generated=total.gaussian(), reference=yardstick.reference)


def why_not_comparable(yardstick: Yardstick, num_images: int) -> str | None:
    """None if the number may stand beside published FIDs, else the reason why not."""
    if yardstick.extractor.comparable is not None:
        return yardstick.extractor.comparable
    if num_images != 50_000:
        return f"published FIDs use 50,000 images, this one {num_images}; the bias of fewer images is large"
    return None
