"""Tensors that still lie in their file: where they are, what shape they have, and how one of them is read.

Nothing is read before it is asked for, and every access gives fresh memory: a 10 GB checkpoint costs as much memory as
the tensors that the caller holds on to. A file that claims more than it contains is refused before anything is
allocated.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from neon.checkpoints.limits import clean, shown

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Readable = io.BufferedReader | io.BytesIO


@dataclass(frozen=True)
class Source:
    """A file as it was when its table of contents was read."""

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> Source:
        if not path.is_file():
            raise FileNotFoundError(
                f"no checkpoint {clean(str(path))}" + (": it is a folder, name a file in it" if path.is_dir() else "")
            )
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def open(self) -> io.BufferedReader:
        """The file, for reading. Raises ValueError if it was replaced since (offsets would point at something else)."""
        if Source.of(self.path) != self:
            raise ValueError(f"{self.path} changed while it was in use; read it again")
        return open(self.path, "rb")


class Window(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file of its own. The file's own position is not kept."""

    def __init__(self, file: Readable, start: int, size: int) -> None:
        self.inner, self.start, self.size, self.position = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        if self.position < 0:
            raise ValueError(f"it points {-self.position} bytes before its beginning: damaged or hostile")
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)[: max(0, self.size - self.position)]
        self.inner.seek(self.start + self.position)
        count = self.inner.readinto(view)
        self.position += count
        return count


def window(file: Readable, start: int, size: int) -> io.BufferedReader:
    return io.BufferedReader(Window(file, start, size))


@dataclass(eq=False)
class Checksum:
    """What a zip archive says of one of its records: CRC-32 of `num_bytes` bytes. Compared once."""

    name: str
    num_bytes: int
    crc32: int
    is_right: bool = False

    def compare(self, found: int, where: object) -> None:
        if found != self.crc32:
            raise ValueError(
                f"{where}: the checksum of {shown(self.name)} is wrong: damaged, copy or download it again"
            )
        self.is_right = True


@dataclass(eq=False)
class Storage:
    """A flat run of `num_elements` elements, `offset` bytes into a file (or into bytes that were embedded as text).

    checksum: of the bytes from `offset` on; only zip archives have one.
    """

    source: Source | bytes
    dtype: torch.dtype
    num_elements: int
    offset: int = 0
    checksum: Checksum | None = None

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    def open(self) -> Readable:
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open()

    def check(self) -> None:
        """Read all bytes that the checksum is of, unless that was done. Raises ValueError naming the file."""
        if self.checksum is None or self.checksum.is_right:
            return
        crc32, left = 0, self.checksum.num_bytes
        with self.open() as file:
            file.seek(self.offset)
            while left and (content := file.read(min(left, 1 << 20))):
                crc32, left = zlib.crc32(content, crc32), left - len(content)
        self.checksum.compare(crc32, self)

    def __str__(self) -> str:
        return "embedded bytes" if isinstance(self.source, bytes) else str(self.source.path)


@dataclass(frozen=True)
class StoredTensor:
    """A strided view of a storage. `offset` and `stride` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_conj: bool = False
    is_neg: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.stride):
            raise ValueError(f"impossible tensor: shape {shown(self.shape)}, stride {shown(self.stride)}")
        claimed = max(self.offset + self.extent, math.prod(self.shape))
        if claimed > self.storage.num_elements:
            raise ValueError(
                f"a tensor of shape {shown(self.shape)} claims {claimed} elements, its storage holds "
                f"{self.storage.num_elements}: "
                "the file is damaged or hostile, nothing was allocated"
            )

    @property
    def extent(self) -> int:
        """Number of elements from the first to the last one in the storage."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def address(self) -> tuple[object, ...]:
        """Equal for two tensors that are one."""
        return id(self.storage), self.offset, self.shape, self.stride, self.is_conj, self.is_neg

    @property
    def is_plain(self) -> bool:
        """Whether its numbers lie in the file in order, without gaps."""
        step, plain = 1, not (self.is_conj or self.is_neg)
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            plain = plain and (size == 1 or stride == step)
            step *= size
        return plain

    @property
    def is_whole_record(self) -> bool:
        """Whether reading it reads exactly what the checksum of its storage is of."""
        checksum = self.storage.checksum
        num_bytes = self.extent * self.storage.dtype.itemsize
        return checksum is not None and self.offset == 0 and num_bytes == checksum.num_bytes

    @property
    def meta(self) -> Tensor:
        """Shape and dtype, without content."""
        return torch.empty(self.shape, dtype=self.storage.dtype, device="meta")

    def read(self) -> Tensor:
        """The content, in memory of its own. Raises ValueError naming the file if its checksum (if any) is wrong."""
        if not self.is_whole_record:
            self.storage.check()
        flat = torch.empty(self.extent, dtype=self.storage.dtype)
        if self.extent:
            buffer = flat.view(torch.uint8).numpy().data
            with self.storage.open() as file:
                file.seek(self.storage.offset + self.offset * flat.itemsize)
                if file.readinto(buffer) != len(buffer):
                    raise ValueError(f"{self.storage} ends inside a tensor of shape {self.shape}: it is truncated")
            if self.is_whole_record and self.storage.checksum and not self.storage.checksum.is_right:
                self.storage.checksum.compare(zlib.crc32(buffer), self.storage)
        tensor = flat.as_strided(self.shape, self.stride)
        if self.is_conj:
            tensor = tensor.conj().resolve_conj()
        return -tensor if self.is_neg else tensor


class Entry(Protocol):
    """A tensor that can be read: stored, or made from stored ones."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def address(self) -> tuple[object, ...]: ...

    def read(self) -> Tensor: ...


class StoredTensors(Mapping[str, Tensor]):
    """name -> tensor, read at each access. `aliases` names the entries that were one tensor when they were saved."""

    def __init__(self, entries: Mapping[str, StoredTensor]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    @cached_property
    def meta(self) -> dict[str, Tensor]:
        """name -> tensor on the meta device: shapes and dtypes, nothing is read."""
        return {name: entry.meta for name, entry in self.entries.items()}

    @cached_property
    def aliases(self) -> dict[str, str]:
        """later name -> first name of tensors that share their memory."""
        first: dict[tuple[object, ...], str] = {}
        found = {}
        for name, entry in self.entries.items():
            kept = first.setdefault(entry.address, name)
            if kept != name and entry.extent:
                found[name] = kept
        return found
