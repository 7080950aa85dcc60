"""Image sets on disk: a folder, a zip, an npz, npy or IDX file or the shards of a run, behind one small interface.

Files are sorted by relative path. Labels come from `dataset.json`, else from class folders, else there are none
(neon/images/labels.py). Nothing is skipped silently: files that cannot be read are named and counted, hidden files and
files that are no images are remarked on.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neon.images.arrays import from_array, open_idx, open_npy, open_npz
from neon.images.containers import Files, FolderFiles, ZipFiles
from neon.images.decode import REFUSED_SUFFIXES, SUFFIXES, decode
from neon.images.image_set import ImageSet, Remarks, UnreadableImagesError
from neon.images.labels import file_labels
from neon.store import files as store
from neon.store import hub, records, shards

PICTURES = SUFFIXES | REFUSED_SUFFIXES
__all__ = ["from_array", "open_images", "write_zip"]


def open_images(path: Path | str, *, use_labels: bool = True, size: int | None = None, pad: int = 0) -> ImageSet:
    """Open an image set.

    path: a folder (also one of a run's `synth` folders), .zip, .npz (`arr_0` or `images`, NHWC, NHW or NCHW), .npy, an
        IDX file (`*-images-idx3-ubyte[.gz]`, its labels file beside it), or a set of torchvision
        (torchvision:CIFAR10:train:/data).
    size: crop files to size x size RGB as ImageNet is prepared (neon/images/crop.py); without it all must have one
        size.
    pad: black pixels on every side.
    Raises FileNotFoundError / ValueError saying what was found.
    """
    path = hub.local(path) if hub.is_remote(path) else path
    if str(path).startswith("torchvision:"):
        from neon.images.torchvision_sets import open_torchvision

        found = open_torchvision(str(path))
    else:
        found = _open(Path(path), size, use_labels)
    if size is not None and found.shape[1:] != (size, size):
        raise ValueError(
            f"{path}: holds {found.shape[1]} x {found.shape[2]} pixels; only image files (folder, .zip) can be "
            f"cropped to {size}"
        )
    if not use_labels:
        found = replace(found, labels=None, labels_from="none: they were not asked for")
    return found.padded(pad) if pad else found


def _open(path: Path, size: int | None, use_labels: bool) -> ImageSet:
    if not path.exists():
        raise FileNotFoundError(f"no image set at {path}")
    remarks = Remarks()
    if path.is_dir():
        if (path / "manifest.json").is_file() and shards.shard_path(path, 0).is_file():
            return _open_shards(path)
        return _open_files(path, FolderFiles(path, remarks), size, use_labels, remarks)
    suffix = path.suffix.lower()
    if suffix == ".zip":
        return _open_files(path, ZipFiles(path, remarks), size, use_labels, remarks)
    if suffix == ".npz":
        return open_npz(path)
    if suffix == ".npy":
        return open_npy(path)
    if "idx" in path.name:
        return open_idx(path)
    raise ValueError(
        f"{path}: not an image set; expected a folder, .zip, .npz, .npy or an IDX file (*-images-idx3-ubyte[.gz]). "
        "Unpack other archives first"
    )


def _open_files(path: Path, files: Files, size: int | None, use_labels: bool, remarks: Remarks) -> ImageSet:
    names = sorted(name for name in files.names if _suffix(name) in PICTURES)
    for name in files.names:
        if _suffix(name) not in PICTURES and name.rsplit("/")[-1] != "dataset.json":
            remarks.add("are no images by their names and not counted", name)
    if not names:
        others = "".join(f"; {sentence}" for sentence in remarks.sentences())
        raise ValueError(
            f"{path}: no images found; looked for *.png, *.jpg, *.npy ... in {len(files.names)} file(s){others}"
        )
    labels, labels_from = file_labels(path, names, files, remarks) if use_labels else (None, "")
    first_name, first = _first_readable(names, files, size, remarks)

    def read(indices: Sequence[int]) -> Tensor:
        images, bad = [], []
        for i in indices:
            try:
                image = decode(names[i], files.content(names[i]), remarks, size)
            except UnreadableImagesError as error:
                bad.extend(error.problems)
                continue
            if (image.shape, image.dtype) != (first.shape, first.dtype):
                bad.append(
                    f"{names[i]}: size {image.shape} {image.dtype} differs from {first_name}'s {first.shape} "
                    f"{first.dtype} (channels, height, width)"
                )
            images.append(image)
        if bad:
            raise UnreadableImagesError(bad)
        return torch.from_numpy(np.stack(images))

    def stored(indices: Sequence[int]) -> bytes:
        return b"".join(names[i].encode("utf-8", "surrogateescape") + b"\0" + files.digest(names[i]) for i in indices)

    return ImageSet(path, names, tuple(first.shape), labels, read, labels_from, remarks, stored)


def _first_readable(names: Sequence[str], files: Files, size: int | None, remarks: Remarks) -> tuple[str, np.ndarray]:
    """The image that says what size the set has. Raises UnreadableImagesError if there is none at all."""
    bad: list[str] = []
    for name in names:
        try:
            return name, decode(name, files.content(name), remarks, size)
        except UnreadableImagesError as error:
            bad.extend(error.problems)
    raise UnreadableImagesError(bad)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _open_shards(folder: Path) -> ImageSet:
    """The synthetic set of a run (neon/sampling/synthesize.py), if it was stored as images."""
    manifest = records.read_manifest(folder)
    stored = manifest.get("store")
    if stored != "images":
        raise ValueError(f"{folder}: holds the sampler's codes, not images (synth.store = {stored!r})")
    found = shards.open_shards(folder, manifest["num_images"], manifest["shard_images"])
    names = [f"{i:08d}" for i in range(len(found))]
    channels, height, width = found.shape
    said = "the shards" if found.labels is not None else "none: the images were sampled without"
    return ImageSet(folder, names, (channels, height, width), found.labels, found.read, said)


def write_zip(path: Path, images: Iterator[Tensor], labels: Tensor | None) -> int:
    """A training set in NVIDIA's layout: `00000/img00000000.png` ... and dataset.json, stored uncompressed. Returns the
    count. The file appears whole or not at all."""
    names: list[str] = []
    with store.replacing(path) as stream, ZipFile(stream, "w", ZIP_STORED) as archive:
        for batch in images:
            for image in batch:
                name = f"{len(names):08d}"[:5] + f"/img{len(names):08d}.png"
                archive.writestr(name, _png(image, compress_level=0))
                names.append(name)
        tags = None if labels is None else [[name, label] for name, label in zip(names, labels.tolist(), strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": tags}))
    return len(names)


def write_folder(folder: Path, images: Iterator[Tensor]) -> int:
    """`00000000.png` ... of uint8 images (B, C, H, W) in a folder that is made. Returns the count."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for batch in images:
        for image in batch:
            with store.replacing(folder / f"{count:08d}.png") as file:
                file.write(_png(image))
            count += 1
    return count


def _png(image: Tensor, compress_level: int = 6) -> bytes:
    """A uint8 image (C, H, W) with 1 or 3 channels as a PNG file."""
    array = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    picture.save(buffer, "png", compress_level=compress_level, optimize=False)
    return buffer.getvalue()
