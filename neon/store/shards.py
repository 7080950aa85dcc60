"""Codes on disk: uncompressed npz shards (`codes`, `labels`, `index`), read through memory maps so that ranks share
pages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fid.files import UNREADABLE, find_member, map_array, map_member
from neon.store import files


class Corpus(Protocol):
    """What is trained on: N codes or images, read by index. `neon.images.image_set.ImageSet` is one, `Shards`
    another."""

    @property
    def labels(self) -> Tensor | None: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], /) -> Tensor: ...


OPEN_FILES = 256
"""Shards that are mapped at the same time; each keeps a file open, and a process may open 1,024 by default."""


class Shards:
    """Consecutive shards as one array. labels: (N,) int64, or None if the shards have none."""

    def __init__(self, paths: Sequence[Path], labels: Tensor | None):
        self.labels = labels
        found = [find_member(path, "codes") for path in paths]
        self._starts = np.cumsum([0, *(header.shape[0] for header, _ in found)])
        self._first = found[0][0]
        self._mapped = lru_cache(OPEN_FILES)(lambda part: map_array(paths[part], *found[part]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one item."""
        return self._first.shape[1:]

    def read(self, indices: Sequence[int], /) -> Tensor:
        """(len(indices), ...) codes in the dtype they were stored in."""
        wanted = np.asarray(indices, dtype=np.int64)
        which = np.searchsorted(self._starts, wanted, side="right") - 1
        out = np.empty((len(wanted), *self.shape), self._first.dtype)
        for part in np.unique(which):
            rows = which == part
            out[rows] = self._mapped(int(part))[wanted[rows] - self._starts[part]]
        return torch.from_numpy(out)


def shard_ranges(num_images: int, shard_images: int) -> list[range]:
    """The images of every shard; a function of the config alone, so any number of ranks makes the same files."""
    return [range(start, min(start + shard_images, num_images)) for start in range(0, num_images, shard_images)]


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.npz"


def write_shard(path: Path, codes: Tensor, labels: Tensor | None, indices: Sequence[int]) -> None:
    """labels: (B,) class indices, (B, K) vectors, or None. Raises ValueError for negative indices, which in a shard say
    that there are none, and for codes of a dtype that numpy does not have."""
    if codes.dtype == torch.bfloat16:
        raise ValueError("codes of bfloat16 cannot be stored: let `sample` (or `encode`) return float32, x.float()")
    if labels is not None and labels.ndim == 1 and (labels < 0).any():
        raise ValueError(
            f"labels must be class indices 0, 1, 2 ..., found {int(labels.min())}: give images without a class an "
            "index of their own, for example the number of classes"
        )
    tags = torch.full((len(codes),), -1) if labels is None else labels
    index = np.asarray(indices, dtype=np.int64)
    with files.replacing(path) as stream:
        np.savez(stream, codes=codes.cpu().numpy(), labels=tags.cpu().numpy(), index=index)


def is_whole(path: Path, indices: range) -> bool:
    """Whether a shard is there, with exactly these images and every byte as it was written.

    Raises ValueError, which says what to do, if it is there and damaged.
    """
    if not path.is_file():
        return False
    try:
        files.check_zip(path)
        found, codes = np.asarray(map_member(path, "index")), map_member(path, "codes")
        if not np.array_equal(found, np.arange(indices.start, indices.stop)) or len(codes) != len(indices):
            raise ValueError(f"holds other images than {indices.start} .. {indices.stop - 1}")
    except UNREADABLE as error:
        raise ValueError(
            f"{path}: damaged ({error}). Delete this file and run the same command again: its images are made again, "
            "the rest is kept"
        ) from error
    return True


def open_shards(folder: Path, num_images: int, shard_images: int) -> Shards:
    """All shards of a folder. Raises ValueError naming the first one that is missing or damaged."""
    ranges = shard_ranges(num_images, shard_images)
    for i, indices in enumerate(ranges):
        if not is_whole(shard_path(folder, i), indices):
            raise ValueError(f"{shard_path(folder, i)}: missing; run the same command again to finish the set")
    return joined([shard_path(folder, i) for i in range(len(ranges))])


def joined(paths: Sequence[Path]) -> Shards:
    """Shards that were checked, as one array."""
    return Shards(paths, labels_of(np.concatenate([np.array(map_member(path, "labels")) for path in paths])))


def labels_of(tags: np.ndarray) -> Tensor | None:
    """What `write_shard` was given."""
    return None if tags.ndim == 1 and (tags < 0).any() else torch.from_numpy(tags)
