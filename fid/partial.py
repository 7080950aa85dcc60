"""Statistics of a part of the images in a file, so that several machines or several days add up to one number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fid.files import replacing
from fid.moments import Moments


@dataclass(frozen=True)
class Partial:
    """Exact sums over the images [start, stop) of a set that `source` names, made by one extractor."""

    moments: Moments
    extractor: str
    extractor_sha256: str
    source: str
    images: tuple[tuple[int, int], ...]  # disjoint, sorted (start, stop)
    num_images: int  # of the whole set

    def check_complete(self) -> None:
        """Raise ValueError naming the first images of the set that are missing."""
        stops = [0, *(stop for _, stop in self.images)]
        starts = [*(start for start, _ in self.images), self.num_images]
        for stop, start in zip(stops, starts, strict=True):
            if stop < start:
                raise ValueError(
                    f"the images {stop} to {start} (the last excluded) of {self.num_images} are in none of the parts"
                )


def write_partial(path: Path, partial: Partial) -> None:
    """Write a partial sum; there is never half a file under its name."""
    header = {
        "extractor": partial.extractor,
        "extractor_sha256": partial.extractor_sha256,
        "source": partial.source,
        "images": json.dumps(partial.images),
        "num_images": json.dumps(partial.num_images),
    }
    sums = {name: value.cpu() for name, value in partial.moments.state().items()}
    with replacing(Path(path)) as stream:
        stream.write(save(sums, metadata=header))


def read_partial(path: Path) -> Partial:
    """Raises FileNotFoundError, or ValueError if the file is none of `write_partial`'s or its count is not that of its
    images."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no partial statistics at {path}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            moments = Moments.from_state({name: file.get_tensor(name) for name in ("count", "mean", "scatter")})
        images = tuple((int(start), int(stop)) for start, stop in json.loads(header["images"]))
        made_with = header["extractor"], header["extractor_sha256"], header["source"]
        partial = Partial(moments, *made_with, images, int(header["num_images"]))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a file of partial statistics, as `neon fid part` writes it ({error})") from error
    covered = sum(stop - start for start, stop in images)
    if covered != moments.count:
        raise ValueError(f"{path}: {moments.count} images were counted, its ranges hold {covered}")
    return partial


def merge_partials(partials: Sequence[Partial]) -> Partial:
    """The sums over all parts. Raises ValueError if they differ in source or extractor, or if an image is in two of
    them."""
    if not partials:
        raise ValueError("no partial statistics to merge")
    first = partials[0]
    for other in partials[1:]:
        for key in ("extractor", "extractor_sha256", "source", "num_images"):
            if getattr(other, key) != getattr(first, key):
                raise ValueError(f"the parts differ in {key}: {getattr(first, key)!r} and {getattr(other, key)!r}")
    ranges = sorted(piece for partial in partials for piece in partial.images)
    for (_, stop), (start, _) in pairwise(ranges):
        if start < stop:
            raise ValueError(f"image {start} is in two of the parts")
    total = Moments(first.moments.dim)
    for partial in sorted(
        partials, key=lambda partial: partial.images
    ):  # a fixed order: the same bits for any order of files
        total.merge(partial.moments)
    made_with = first.extractor, first.extractor_sha256, first.source
    return Partial(total, *made_with, _joined(ranges), first.num_images)


def _joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)
