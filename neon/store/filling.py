"""A set of codes made by all ranks: shared batch by batch, so that nobody idles, and resumable at the same grain.

A batch belongs to one shard and is a function of the config alone, so any number of ranks makes the same files. Ranks
keep what they made in `parts/` until the shards of a round are whole; a killed round goes on from its parts.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fid.files import UNREADABLE, map_member
from neon.runtime.distributed import World
from neon.runtime.progress import progress, say
from neon.store import files, shards

LOG = logging.getLogger(__name__)

Made = tuple[Sequence[int], Tensor, Tensor | None]
"""Indices of a batch, their codes (B, ...) and labels (B,) or None."""
Make = Callable[[Sequence[Sequence[int]]], Iterator[Made]]
"""Given batches of indices, what each of them becomes, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which set is made, and how it is cut."""

    folder: Path
    num_images: int
    shard_images: int
    batch: int
    damaged: Literal["refuse", "remake"]
    """What happens to a damaged shard: an error, or, for what only depends on files that are there, a warning."""

    @property
    def ranges(self) -> list[range]:
        return shards.shard_ranges(self.num_images, self.shard_images)

    def path(self, shard: int) -> Path:
        return shards.shard_path(self.folder, shard)


def fill(plan: Plan, make: Make, world: World, desc: str) -> shards.Shards:
    """Make what the folder lacks, and open it."""
    ranges, parts = plan.ranges, plan.folder / "parts"
    whole = _whole(plan, world)
    missing = [i for i in range(len(ranges)) if i not in whole]
    left = world.broadcast(_kept(parts) if world.is_main else set())
    kept = {k for i in missing for k in ranges[i] if k in left}
    done = sum(len(ranges[i]) for i in whole) + len(kept)
    if done:
        rest = ", going on" if missing else ""
        say(world, f"{desc}: found {done:,} of {plan.num_images:,} images in {plan.folder}{rest}")
    bar = progress(total=plan.num_images, initial=done, desc=desc, unit="img", world=world)
    for first in range(0, len(missing), world.size):
        round_ = missing[first : first + world.size]
        batches = [batch for i in round_ for batch in _cut([k for k in ranges[i] if k not in kept], plan.batch)]
        keeper = _Keeper(parts, plan.shard_images)
        for made in make(batches[world.rank :: world.size]):
            keeper.add(made)
            bar.update(len(made[0]) * world.size)
        keeper.flush()
        world.barrier()
        for i in round_[world.rank :: world.size]:
            _assemble(parts, plan.path(i), ranges[i])
        world.barrier()
        if world.is_main:
            shutil.rmtree(parts, ignore_errors=True)
        world.barrier()  # or the next round's first part would be removed with this round's
    bar.close()
    return shards.joined([plan.path(i) for i in range(len(ranges))])


def _cut(indices: list[int], batch: int) -> list[list[int]]:
    return [indices[start : start + batch] for start in range(0, len(indices), batch)]


def _whole(plan: Plan, world: World) -> set[int]:
    """The shards that are there. Every rank looks at its share."""
    found = set()
    for i, indices in list(enumerate(plan.ranges))[world.rank :: world.size]:
        try:
            if shards.is_whole(plan.path(i), indices):
                found.add(i)
        except ValueError as error:
            if plan.damaged == "refuse":
                raise
            LOG.warning("%s. It is made again", error)
            plan.path(i).unlink()
    return {i for part in world.gather(found) for i in part}


def _kept(parts: Path) -> set[int]:
    """Images that a killed round left in its parts. A damaged part is removed with a warning."""
    kept: set[int] = set()
    for path in sorted(parts.glob("part-*.npz")):
        try:
            files.check_zip(path)
            kept.update(map_member(path, "index").tolist())
        except UNREADABLE as error:
            LOG.warning("%s: damaged (%s). It is made again", path, error)
            path.unlink()
    return kept


class _Keeper:
    """What a rank has made, written down as often as 5 % of the time allows."""

    SHARE_OF_TIME = 0.05

    def __init__(self, folder: Path, most_images: int):
        self._folder, self._most_images = folder, most_images
        self._made: list[Made] = []
        self._written_at, self._took_s = time.monotonic(), 0.0

    def add(self, made: Made) -> None:
        indices, codes, labels = made
        self._made.append((indices, codes.cpu(), None if labels is None else labels.cpu()))
        is_due = time.monotonic() - self._written_at > self._took_s / self.SHARE_OF_TIME
        if is_due or sum(len(indices) for indices, *_ in self._made) >= self._most_images:
            self.flush()

    def flush(self) -> None:
        if not self._made:
            return
        started = time.monotonic()
        indices = [i for part, *_ in self._made for i in part]
        labels = [part for *_, part in self._made if part is not None]
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"part-{indices[0]:012d}.npz"
        codes = torch.cat([part for _, part, _ in self._made])
        shards.write_shard(path, codes, torch.cat(labels) if labels else None, indices)
        self._made, self._written_at = [], time.monotonic()
        self._took_s = self._written_at - started


def _assemble(parts: Path, path: Path, indices: range) -> None:
    """One shard from the parts that hold its images."""
    found: dict[str, np.ndarray] = {}
    count = 0
    for part in sorted(parts.glob("part-*.npz")):
        index = np.array(map_member(part, "index"))
        rows = np.flatnonzero((index >= indices.start) & (index < indices.stop))
        for key in ("codes", "labels") if len(rows) else ():
            values = map_member(part, key)
            out = found.setdefault(key, np.empty((len(indices), *values.shape[1:]), values.dtype))
            out[index[rows] - indices.start] = values[rows]
        count += len(rows)
    if count != len(indices):
        raise ValueError(f"{parts}: {count} images for {path.name}, expected {len(indices)}. Run the command again")
    shards.write_shard(path, torch.from_numpy(found["codes"]), shards.labels_of(found["labels"]), indices)
