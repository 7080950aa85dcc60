"""`neon.evaluate`: the metrics of images that are there already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fid.reference import read_reference
from neon.evaluation.collect import collect
from neon.evaluation.options import Report
from neon.evaluation.yardsticks import open_yardsticks
from neon.images.formats import open_images
from neon.runtime.distributed import World


def evaluate(
    images: Tensor | str | Path,
    reference: str | Path | Mapping[str, str],
    *,
    batch: int = 64,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Frechet distance of images to a reference: {"fid50k[inception-2015-12-05]": value}, whose name says with what
    the value may be compared.

    images: uint8 (N, C, H, W) with 1 or 3 channels, or the path of an image set (folder, zip, npz, IDX file).
    reference: a statistics file as `neon fid ref` makes it, or several, {extractor: file}.
    The same numbers as `neon fid` gives for the same set. Raises ValueError for other images or a reference of another
    extractor, FileNotFoundError if there is no such file.
    """
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images: expected uint8 (N, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}; floats in "
                "[-1, 1] are rounded by neon.quantize.to_uint8"
            )
        read, count = (lambda indices: images[indices[0] : indices[-1] + 1]), len(images)
    else:
        images_on_disk = open_images(Path(images))
        read, count = images_on_disk.read, len(images_on_disk)
    yardsticks = open_yardsticks(
        Report(num_images=count, first_seed=0, extractors=references(reference)), torch.device(device)
    )
    world = World(device=torch.device(device))
    found = collect(
        lambda batches: ((part, read(part)) for part in batches),
        yardsticks,
        range(count),
        batch,
        world,
        desc="evaluate",
    )
    values: dict[str, float] = {}
    for yardstick, collector in zip(yardsticks, found.collectors, strict=True):
        values |= yardstick.values(collector)
    return values


def references(reference: object) -> dict[str, str]:
    """{extractor: reference file}, as [report] has it, of one file that names its extractor, or of such a table."""
    if isinstance(reference, Mapping):
        return {str(name): str(path) for name, path in reference.items()}
    if not isinstance(reference, (str, Path)):
        raise ValueError(f"expected a reference file or {{extractor: file}}, found {reference!r}")
    extractor = read_reference(Path(reference)).extractor
    if extractor is None:
        raise ValueError(f"{reference} does not name its extractor; say it: {{EXTRACTOR: {str(reference)!r}}}")
    return {extractor: str(reference)}
