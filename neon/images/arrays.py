"""Images in arrays: .npz, .npy and IDX files. Large ones are read where they lie."""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from fid.files import UNREADABLE, ArrayHeader, data_offset, map_array, not_what_it_is_called, read_array_header
from neon.images.image_set import ImageSet
from neon.images.labels import checked_labels

IN_MEMORY_BYTES = 256 << 20
"""A compressed array up to this size is unpacked once; a larger one is streamed."""
MOST_UNPACKED_BYTES = 1 << 30
"""Of an IDX file in gzip; the largest set in this format, EMNIST's, has 638 MB."""


class Rows(Protocol):
    """An array (N, ...) that is read by its first index."""

    def __call__(self, indices: Sequence[int], /) -> np.ndarray: ...


def open_npz(path: Path) -> ImageSet:
    """Images under `images` or `arr_0`, labels under `labels` or `arr_1`. An uncompressed array is mapped into memory;
    of a large compressed one only what is asked for is unpacked, in one go from front to back."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            key = next((key for key in ("images", "arr_0") if key in members), None)
            if key is None:
                raise ValueError(
                    f"expected the images under 'images' or 'arr_0', found {', '.join(members) or 'nothing'}"
                )
            with archive.open(members[key]) as stream:
                header = read_array_header(stream)
        check_layout(header.dtype, header.shape)
        rows = _rows(path, members[key], header)
        label_key = next((key for key in ("labels", "arr_1") if key in members), None)
        with np.load(path, allow_pickle=False) as data:
            labels = None if label_key is None else data[label_key]
    except UNREADABLE as error:
        if (instead := not_what_it_is_called(path)) is not None:
            raise ValueError(f"{path}: {instead}") from error
        raise ValueError(f"{path}: not a usable .npz of images ({error})") from error
    found = _array_set(path, header.shape, rows, labels, "" if label_key is None else label_key)
    return replace(found, stored=lambda _: struct.pack("<QI", members[key].file_size, members[key].CRC))


def open_npy(path: Path) -> ImageSet:
    """A single array of images, mapped into memory; it has no labels."""
    try:
        with path.open("rb") as stream:
            header = read_array_header(stream)
        check_layout(header.dtype, header.shape)
        array = map_array(path, header)
    except UNREADABLE as error:
        if (instead := not_what_it_is_called(path)) is not None:
            raise ValueError(f"{path}: {instead}") from error
        raise ValueError(f"{path}: not a usable .npy of images ({error})") from error
    return _array_set(path, header.shape, lambda indices: array[np.asarray(indices)], None, "")


def from_array(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> ImageSet:
    """A set in memory: uint8 images NHW, NHWC (1 or 3 channels last) or NCHW. path: what messages call it."""
    try:
        check_layout(images.dtype, images.shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _array_set(path, images.shape, lambda indices: images[np.asarray(indices)], labels, "the labels given")


def _array_set(path: Path, shape: tuple[int, ...], rows: Rows, labels: np.ndarray | None, labels_from: str) -> ImageSet:
    order = channel_order(shape)
    channels, height, width = (1, *shape[1:]) if order is None else tuple(shape[1 + axis] for axis in order)

    def read(indices: Sequence[int]) -> Tensor:
        array = rows(indices)
        array = array[:, None] if order is None else array.transpose(0, *(1 + axis for axis in order))
        return torch.tensor(array)

    tags = None
    if labels is not None:
        if len(labels.shape) == 0 or len(labels) != shape[0]:
            raise ValueError(f"{path}: {shape[0]} images but labels {labels.shape}")
        tags = checked_labels(f"{path}: {labels_from}", labels)
    said = "none: all of them are -1" if labels is not None else "none: the file holds no labels"
    names = [f"{i:08d}" for i in range(shape[0])]
    return ImageSet(path, names, (channels, height, width), tags, read, labels_from if tags is not None else said)


def check_layout(dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError for what is no array of N 8-bit images with 1 or 3 channels, or can be read in two ways."""
    expected = "expected uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels"
    found = f"found {dtype} {shape}"
    if dtype.kind == "f":
        raise ValueError(f"{expected}; {found}. Floats in [-1, 1] are rounded by neon.quantize.to_uint8")
    if dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(f"{expected}; {found}")
    if len(shape) == 3 and (shape[2] in (1, 3) or (shape[2] == 4 and shape[1] != 4)):
        raise ValueError(
            f"{expected}; {found}, which looks like one image with its channels last: add an axis in front"
        )
    if len(shape) == 4:
        is_last, is_first = shape[3] in (1, 3), shape[1] in (1, 3)
        if not (is_last or is_first):
            raise ValueError(f"{expected}; {found}")
        if is_last and is_first:
            raise ValueError(f"{expected}; {found}, which can be read as channels first or last: give larger images")


def channel_order(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """The axes of one image that are its channels, height and width; None for grey images without a channel axis."""
    if len(shape) == 3:
        return None
    return (2, 0, 1) if shape[3] in (1, 3) else (0, 1, 2)


def _rows(path: Path, member: zipfile.ZipInfo, header: ArrayHeader) -> Rows:
    if member.compress_type == zipfile.ZIP_STORED:
        array = map_array(path, header, data_offset(path, member))
        return lambda indices: array[np.asarray(indices)]
    if member.file_size <= IN_MEMORY_BYTES or header.is_fortran:
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            whole = np.lib.format.read_array(stream, allow_pickle=False)
        return lambda indices: whole[np.asarray(indices)]
    return StreamedRows(path, member, header)


class StreamedRows:
    """Rows of a compressed array, unpacked as they are asked for. In rising order every byte is unpacked once; going
    back starts again from the front. Memory: the rows asked for."""

    BLOCK_BYTES = 1 << 22

    def __init__(self, path: Path, member: zipfile.ZipInfo, header: ArrayHeader):
        self._path, self._member, self._header = path, member, header
        self._row_bytes = int(np.prod(header.shape[1:], dtype=np.int64)) * header.dtype.itemsize
        self._stream: IO[bytes] | None = None
        self._next, self._owner = 0, 0

    def __call__(self, indices: Sequence[int], /) -> np.ndarray:
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self._header.shape[0]:
            raise IndexError(
                f"{self._path}: images 0 to {self._header.shape[0] - 1} are there, asked for {wanted.max()}"
            )
        out = np.empty((len(wanted), *self._header.shape[1:]), self._header.dtype)
        try:
            for place in np.argsort(wanted, kind="stable"):
                out[place] = self._row(int(wanted[place]))
        except UNREADABLE as error:
            raise ValueError(f"{self._path}: cannot be unpacked ({error})") from error
        return out

    def _row(self, index: int) -> np.ndarray:
        if self._stream is None or index < self._next or self._owner != os.getpid():  # a fork shares the position
            self._stream = zipfile.ZipFile(self._path).open(self._member)  # noqa: SIM115 - kept open
            read_array_header(self._stream)
            self._next, self._owner = 0, os.getpid()
        skip = (index - self._next) * self._row_bytes
        while skip:
            got = len(self._stream.read(min(skip, self.BLOCK_BYTES)))
            if not got:
                raise EOFError("the data end before the last image")
            skip -= got
        data = self._stream.read(self._row_bytes)
        if len(data) < self._row_bytes:
            raise EOFError("the data end before the last image")
        self._next = index + 1
        return np.frombuffer(data, self._header.dtype).reshape(self._header.shape[1:])


def open_idx(path: Path) -> ImageSet:
    """LeCun's format, with the labels file beside it if there is one."""
    images = read_idx(path)
    beside = path.with_name(path.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1"))
    return from_array(path, images, read_idx(beside) if beside != path and beside.is_file() else None)


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array in LeCun's IDX format, plain or gzipped."""
    if path.suffix.lower() != ".gz":
        return parse_idx(path.read_bytes(), str(path))
    try:
        with gzip.open(path) as file:
            data = file.read(MOST_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from error
    if len(data) > MOST_UNPACKED_BYTES:
        raise ValueError(f"{path}: unpacks to more than {MOST_UNPACKED_BYTES >> 20} MiB; unpack it with gunzip first")
    return parse_idx(data, str(path))


def parse_idx(data: bytes, name: str) -> np.ndarray:
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(
            f"{name}: not an IDX file of unsigned bytes (expected the header 00 00 08, found {data[:3].hex(' ')})"
        )
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    body = np.frombuffer(bytearray(data), np.uint8, offset=4 + 4 * data[3])  # writable, as torch wants it
    if body.size != int(np.prod(shape, dtype=np.float64)):
        raise ValueError(f"{name}: the header announces {shape}, the file holds {body.size} bytes (truncated?)")
    return body.reshape(shape)
