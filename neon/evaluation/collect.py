"""One pass over a set of images by all ranks: features summed (and kept where a metric needs them), resumable after a
kill."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fid.evaluator import Collector
from fid.features import Extractor
from fid.moments import Moments
from fid.names import Metric
from neon.images.image_set import UnreadableImagesError
from neon.quantize import DivergedError
from neon.runtime.distributed import World
from neon.runtime.progress import progress
from neon.store import records

log = logging.getLogger(__name__)
Images = Callable[[Sequence[range]], Iterator[tuple[Sequence[int], Tensor]]]
"""Given batches of indices, the images of each: (indices, uint8 (B, C, H, W))."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be collected with one extractor."""

    extractor: Extractor
    metrics: Sequence[Metric] = ("fid",)
    keep_features: bool = False
    """Also where no metric asks for every image's features."""

    def collector(self, num_images: int, folder: Path | None) -> Collector:
        """What takes in the images, empty. folder: where it keeps what must survive a kill; None: nothing does."""
        return Collector(self.extractor, num_images, self.metrics, folder=folder, keep_features=self.keep_features)


@dataclass(frozen=True)
class Collected:
    """What every rank knows after the pass. shown: the first images, uint8 (n, C, H, W)."""

    collectors: Sequence[Collector]
    shown: Tensor | None
    source_s: float
    """Time that this rank spent on making or reading images."""
    feature_s: float


def collect(
    images: Images,
    wanted: Sequence[Wanted],
    chosen: range,
    batch: int,
    world: World,
    *,
    num_images: int | None = None,
    num_shown: int = 0,
    partial: Path | None = None,
    desc: str,
) -> Collected:
    """Bring the images `chosen` (consecutive indices of a set of num_images, default: all of it) once to every
    extractor.

    partial: a folder in which every rank keeps its sums so far; the same pass, killed, goes on from there and ends
        with the same bits. The caller makes it unique to everything the features depend on, and to `batch`; it is
        removed at the end.
    Raises DivergedError on all ranks if the images of one are not numbers, UnreadableImagesError on rank 0 with the
    files of all ranks that cannot be used.
    """
    started = time.perf_counter()
    mine = None if partial is None else partial / f"rank-{world.rank}-of-{world.size}"

    def empty() -> list[Collector]:
        return [_collector(w, num_images or len(chosen), mine, i) for i, w in enumerate(wanted)]

    batches = world.batches(chosen.stop, batch, chosen.start)
    saver = None if mine is None else records.Saver(mine / "state.pt")
    done, collectors, shown = (0, empty(), {}) if saver is None else _restore(saver.path, empty)
    feature_s = 0.0
    bar = progress(total=len(chosen), initial=done * batch * world.size, desc=desc, unit="img", world=world)
    diverged: str | None = None
    unusable: list[str] = []
    try:
        for indices, pixels in images(batches[done:]):
            before = time.perf_counter()
            for collector in collectors:
                collector.update(pixels, indices)
            feature_s += time.perf_counter() - before
            shown.update({i: image.cpu() for i, image in zip(indices, pixels, strict=True) if i < num_shown})
            done += 1
            bar.update(len(indices) * world.size)
            if saver is not None and saver.is_due:
                saver.save({"done": done, "collectors": [c.state() for c in collectors], "shown": shown})
    except DivergedError as error:  # said to all ranks below: the others would wait for this one
        diverged = str(error)
    except UnreadableImagesError as error:
        unusable = error.problems
    bar.close()
    source_s = time.perf_counter() - started - feature_s
    if messages := [message for message in world.gather(diverged) if message]:
        _remove(partial, world)
        raise DivergedError(messages[0])
    if problems := sorted(problem for part in world.gather(unusable) for problem in part):
        _remove(partial, world)
        raise UnreadableImagesError(problems) if world.is_main else ValueError("rank 0 names the files")
    for collector in collectors:
        _join(collector, world)
    everywhere = {i: image for part in world.gather(shown) for i, image in part.items()} if num_shown else {}
    _remove(partial, world)
    grid = torch.stack([everywhere[i] for i in sorted(everywhere)]) if everywhere else None
    return Collected(collectors, grid, source_s, feature_s)


def _collector(wanted: Wanted, num_images: int, mine: Path | None, number: int) -> Collector:
    folder = None
    if mine is not None:
        folder = mine / f"features-{number}"
        folder.mkdir(parents=True, exist_ok=True)
    return wanted.collector(num_images, folder)


def _restore(path: Path, empty: Callable[[], list[Collector]]) -> tuple[int, list[Collector], dict[int, Tensor]]:
    """What a killed pass had: the number of batches done, the sums over them and the images to show. Nothing, if that
    is damaged."""
    collectors = empty()
    if not path.is_file():
        return 0, collectors, {}
    try:
        state = records.read_state(path)
        for collector, saved in zip(collectors, state["collectors"], strict=True):
            collector.load_state(saved)
        return int(state["done"]), collectors, state["shown"]
    except (ValueError, KeyError) as error:
        log.warning("%s. This pass begins again", error)
        return 0, empty(), {}


def _remove(partial: Path | None, world: World) -> None:
    """Remove what a pass kept, once all ranks are done with it: every rank's state first, because a state without the
    features that it counts would be gone on with."""
    world.barrier()
    if partial is None or not world.is_main:
        return
    for state in partial.glob("*/state.pt"):
        state.unlink()
    shutil.rmtree(partial)


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
