"""Codes on disk: uncompressed npz shards (`codes`, `labels`, `index`), read through memory maps so that ranks share
pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fid.files import map_member
from neon.store import files


class Corpus(Protocol):
    """What is trained on: N codes or images, read by index. `neon.images.image_set.ImageSet` is one, `Shards`
    another."""

    @property
    def labels(self) -> Tensor | None: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], /) -> Tensor: ...


@dataclass(frozen=True)
class Shards:
    """Consecutive shards as one array. labels: (N,) int64, or None if the shards have none."""

    parts: Sequence[np.ndarray]
    labels: Tensor | None

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, indices: Sequence[int], /) -> Tensor:
        """(len(indices), ...) codes in the dtype they were stored in."""
        wanted = np.asarray(indices, dtype=np.int64)
        starts = np.cumsum([0, *map(len, self.parts)])
        which = np.searchsorted(starts, wanted, side="right") - 1
        out = np.empty((len(wanted), *self.parts[0].shape[1:]), self.parts[0].dtype)
        for part in np.unique(which):
            rows = which == part
            out[rows] = self.parts[part][wanted[rows] - starts[part]]
        return torch.from_numpy(out)


def shard_ranges(num_images: int, shard_images: int) -> list[range]:
    """The images of every shard; a function of the config alone, so any number of ranks makes the same files."""
    return [range(start, min(start + shard_images, num_images)) for start in range(0, num_images, shard_images)]


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.npz"


def write_shard(path: Path, codes: Tensor, labels: Tensor | None, indices: Sequence[int]) -> None:
    tags = torch.full((len(codes),), -1) if labels is None else labels
    index = np.asarray(indices, dtype=np.int64)
    with files.replacing(path) as stream:
        np.savez(stream, codes=codes.cpu().numpy(), labels=tags.cpu().numpy(), index=index)


def is_complete(path: Path, indices: range) -> bool:
    """Whether a shard is there with exactly these images (files appear by rename, so a file that exists is whole)."""
    if not path.is_file():
        return False
    with np.load(path, allow_pickle=False) as data:
        return np.array_equal(data["index"], np.arange(indices.start, indices.stop))


def open_shards(folder: Path, num_images: int, shard_images: int) -> Shards:
    """All shards of a folder. Raises ValueError naming the first one that is missing or incomplete."""
    ranges = shard_ranges(num_images, shard_images)
    for i, indices in enumerate(ranges):
        if not is_complete(shard_path(folder, i), indices):
            raise ValueError(
                f"{shard_path(folder, i)}: missing or incomplete; run the same command again to finish the set"
            )
    paths = [shard_path(folder, i) for i in range(len(ranges))]
    tags = np.concatenate([map_member(path, "labels") for path in paths])
    return Shards([map_member(path, "codes") for path in paths], None if (tags < 0).any() else torch.from_numpy(tags))
