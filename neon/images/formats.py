"""Image sets on disk: a folder, a zip, an npz, an IDX file or the shards of a run, behind one small interface.

Files are sorted by relative path. Labels come from `dataset.json` (NVIDIA's format), else from class folders
(`<class>/<file>`, classes sorted by name), else there are none. Nothing is skipped silently: files that cannot be read
are named and counted.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neon.images.crop import center_crop
from neon.images.image_set import ImageSet, UnreadableImagesError, pixels
from neon.store import records, shards


def open_images(
    path: Path | str,
    *,
    use_labels: bool = True,
    size: int | None = None,
    max_size: int | None = None,
    mirror: bool = False,
    seed: int = 0,
    pad: int = 0,
) -> ImageSet:
    """Open an image set.

    path: a folder (also one of a run's `synth` folders), .zip, .npz (`arr_0` or `images`, NHWC, NHW or NCHW), an IDX
        file (`*-images-idx3-ubyte[.gz]`, its labels file beside it), or a set of torchvision
        (torchvision:CIFAR10:train:/data).
    size: crop files to size x size RGB as ImageNet is prepared (neon/images/crop.py); without it all must have one
            size.
    max_size: keep a random subset of this size, chosen by numpy's RandomState(seed), in order.
    mirror: append the mirrored copies.
    pad: black pixels on every side.
    Raises FileNotFoundError / ValueError saying what was found.
    """
    if str(path).startswith("torchvision:"):
        from neon.images.torchvision_sets import open_torchvision

        found = open_torchvision(str(path))
    else:
        found = _open(Path(path), size)
    if size is not None and found.shape[1:] != (size, size):
        raise ValueError(
            f"{path}: holds {found.shape[1]} x {found.shape[2]} pixels; only image files (folder, .zip) can be "
            f"cropped to {size}"
        )
    if not use_labels and found.labels is not None:
        found = ImageSet(found.path, found.names, found.shape, None, found.read)
    if max_size is not None and max_size < len(found):
        order = np.arange(len(found), dtype=np.int64)
        np.random.RandomState(seed).shuffle(order)
        found = found.subset(np.sort(order[:max_size]).tolist())
    found = found.padded(pad) if pad else found
    return found.mirrored() if mirror else found


def _open(path: Path, size: int | None) -> ImageSet:
    if not path.exists():
        raise FileNotFoundError(f"no image set at {path}")
    if path.is_dir():
        return _open_shards(path) if (path / "manifest.json").is_file() else _open_files(path, _FolderFiles(path), size)
    if path.suffix == ".zip":
        return _open_files(path, _ZipFiles(path), size)
    if path.suffix == ".npz":
        return _open_npz(path)
    if "idx" in path.name:
        return _open_idx(path)
    raise ValueError(
        f"{path}: not an image set; expected a folder, .zip, .npz or an IDX file (*-images-idx3-ubyte[.gz])"
    )


class _FolderFiles:
    def __init__(self, root: Path):
        self._root = root

    def names(self) -> list[str]:
        return [file.relative_to(self._root).as_posix() for file in self._root.rglob("*") if file.is_file()]

    def bytes(self, name: str) -> bytes:
        return (self._root / name).read_bytes()


class _ZipFiles:
    """Reads through a fresh handle per call, so that several processes may share an open set."""

    def __init__(self, path: Path):
        self._path = path
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path}: not a readable zip archive (truncated, or something else saved under this name)")

    def names(self) -> list[str]:
        with zipfile.ZipFile(self._path) as archive:
            return [name for name in archive.namelist() if not name.endswith("/")]

    def bytes(self, name: str) -> bytes:
        with zipfile.ZipFile(self._path) as archive:
            return archive.read(name)


def _open_files(path: Path, files: _FolderFiles | _ZipFiles, size: int | None) -> ImageSet:
    Image.init()
    wanted = {*Image.EXTENSION, ".npy"}
    every = files.names()
    names = sorted(name for name in every if PurePosixPath(name).suffix.lower() in wanted)
    if not names:
        raise ValueError(f"{path}: no images found; looked for *.png, *.jpg, *.npy ... in {len(every)} file(s)")
    first = _decode(names[0], files.bytes(names[0]), size)
    shape = tuple(first.shape)

    def read(indices: Sequence[int]) -> Tensor:
        images, bad = [], []
        for i in indices:
            try:
                image = _decode(names[i], files.bytes(names[i]), size)
                if image.shape != shape:
                    raise ValueError(
                        f"{names[i]}: size {tuple(image.shape)} differs from the first image's {shape} (channels, "
                        "height, width)"
                    )
                images.append(image)
            except UnreadableImagesError as error:
                bad.extend(error.problems)
            except ValueError as error:
                bad.append(str(error))
        if bad:
            raise UnreadableImagesError(bad)
        return torch.from_numpy(np.stack(images))

    return ImageSet(path, names, shape, _file_labels(path, names, files, every), read)


def _decode(name: str, data: bytes, size: int | None) -> np.ndarray:
    """(C, H, W) uint8, or float32 for .npy; a file that is no plain 8-bit grey or RGB image is refused, unless it is to
    be cropped."""
    if name.endswith(".npy"):
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return array.reshape(-1, *array.shape[-2:])
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImagesError([f"{name}: cannot be decoded ({error})"]) from error
    return pixels(name, image if size is None else center_crop(image.convert("RGB"), size))


def _file_labels(
    path: Path, names: Sequence[str], files: _FolderFiles | _ZipFiles, every: Sequence[str]
) -> Tensor | None:
    if "dataset.json" in every:
        entries = json.loads(files.bytes("dataset.json")).get("labels")
        if entries is None:
            return None
        by_name = {name.replace("\\", "/"): label for name, label in entries}
        missing = [name for name in names if name not in by_name]
        if missing:
            raise ValueError(
                f"{path}: dataset.json has no label for {len(missing)} of {len(names)} images, first: {missing[0]}"
            )
        labels = np.array([by_name[name] for name in names])
        return torch.from_numpy(labels.astype(np.int64 if labels.ndim == 1 else np.float32))
    classes = [PurePosixPath(name).parts[0] if len(PurePosixPath(name).parts) > 1 else None for name in names]
    if None in classes or len(set(classes)) < 2:
        return None
    index = {name: i for i, name in enumerate(sorted(set(classes)))}  # type: ignore[type-var]
    return torch.tensor([index[name] for name in classes])


def _open_npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as data:
            key = next((key for key in ("images", "arr_0") if key in data.files), None)
            if key is None:
                raise ValueError(
                    f"{path}: expected the images under 'images' or 'arr_0', found the keys {', '.join(data.files)}"
                )
            images = data[key]
            label_key = next((k for k in ("labels", "arr_1") if k in data.files), None)
            labels = None if label_key is None else data[label_key]
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable npz file ({error})") from error
    return from_array(path, images, labels)


def from_array(path: Path, images: np.ndarray, labels: np.ndarray | None) -> ImageSet:
    """A set in memory: uint8 images NHW, NHWC (1 or 3 channels last) or NCHW; labels (N,) with -1 for none."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) == 0:
        raise ValueError(
            f"{path}: expected uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W), found {images.dtype} "
            f"{images.shape}"
        )
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    elif images.shape[1] not in (1, 3):
        raise ValueError(f"{path}: found images of shape {images.shape[1:]}; expected 1 or 3 channels, first or last")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{path}: {len(images)} images but {len(labels)} labels")
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    tags = None if labels is None or (labels < 0).any() else torch.from_numpy(labels.astype(np.int64))
    names = [f"{i:08d}" for i in range(len(images))]
    _, channels, height, width = tensor.shape
    return ImageSet(
        path,
        names,
        (channels, height, width),
        tags,
        lambda indices: tensor[torch.as_tensor(list(indices), dtype=torch.long)],
    )


def _open_shards(folder: Path) -> ImageSet:
    """The synthetic set of a run (neon/sampling/synthesize.py), if it was stored as images."""
    manifest = records.read_manifest(folder)
    if manifest.get("store") != "images":
        raise ValueError(f"{folder}: holds the sampler's codes, not images (synth.store = {manifest.get('store')!r})")
    found = shards.open_shards(folder, manifest["num_images"], manifest["shard_images"])
    names = [f"{i:08d}" for i in range(len(found))]
    channels, height, width = found.shape
    return ImageSet(folder, names, (channels, height, width), found.labels, found.read)


def _open_idx(path: Path) -> ImageSet:
    images = read_idx(path)
    beside = path.with_name(path.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1"))
    return from_array(path, images, read_idx(beside) if beside != path and beside.is_file() else None)


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array in LeCun's IDX format, plain or gzipped."""
    data = path.read_bytes()
    return parse_idx(gzip.decompress(data) if path.suffix == ".gz" else data, str(path))


def parse_idx(data: bytes, name: str) -> np.ndarray:
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{name}: not an IDX file of unsigned bytes (expected the header 00 00 08, found {data[:3].hex(' ')})"
        )
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    body = np.frombuffer(bytearray(data), np.uint8, offset=4 + 4 * data[3])  # writable, as torch wants it
    if body.size != int(np.prod(shape)):
        raise ValueError(f"{name}: the header announces {shape}, the file holds {body.size} bytes (truncated?)")
    return body.reshape(shape)


def write_zip(path: Path, images: Iterator[Tensor], labels: Tensor | None) -> int:
    """A training set in NVIDIA's layout: `00000/img00000000.png` ... and dataset.json, stored uncompressed. Returns the
    count."""
    count = 0
    names: list[str] = []
    temporary = path.with_name(path.name + ".part")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for batch in images:
            for image in batch:
                name = f"{count:08d}"[:5] + f"/img{count:08d}.png"
                array = image.permute(1, 2, 0).numpy()
                buffer = io.BytesIO()
                Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(
                    buffer, "png", compress_level=0, optimize=False
                )
                archive.writestr(name, buffer.getvalue())
                names.append(name)
                count += 1
        tags = None if labels is None else [[name, label] for name, label in zip(names, labels.tolist(), strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": tags}))
    temporary.replace(path)
    return count
