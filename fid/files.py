"""Files: written whole or not at all, hashed, and the arrays inside .npy and .npz files found without loading them.

The one place for this. The evaluator stands below everything else here, so that neon's writers use it too.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import IO, BinaryIO, Literal, Protocol

import numpy as np

UNREADABLE = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, LZMAError, RuntimeError, KeyError)
"""What zipfile and numpy raise for a file that is damaged, encrypted or packed in a way that they do not know."""


UTF_8 = 0x800
"""The flag of a zip member that says how its name is encoded."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an error; until then `path` is
    untouched.

    The temporary file lies in the same folder (a rename is atomic only within one file system), is on the disk before
    the rename, and is removed if the block raises. Raises FileNotFoundError if there is no such folder; an OSError of
    the writing itself (a full disk, a quota) names the path and says that what was there still is.
    """
    check_writable(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with named_in_errors(path), open(temporary, "xb+") as file:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says that it is in use: see `remove_abandoned`
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """An OSError of writing (a full disk, a quota) names the path that was to be written, and says what is there."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        kept = "what was there before is kept" if path.exists() else "no half of it is left"
        advice = "Make room or choose another folder, then run the same command again"
        message = f"{error.strerror} while it was written; {kept}. {advice}"
        raise OSError(error.errno, message, str(path)) from error


def remove_abandoned(path: Path) -> None:
    """Remove the half-written files (or folders) that `path` was to be made from and whose process was killed."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        with suppress(OSError):  # in use, or gone meanwhile
            descriptor = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            finally:
                os.close(descriptor)


def check_writable(path: Path, *, make_folder: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raise, before any work, what writing `path` would raise after it: no such folder, no permission, a folder there.

    make_folder: make the folder if it is not there. inputs: what `path` is made from, which it must not replace (also
        not through a link).
    Raises FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError, FileExistsError (a device or
    pipe) or ValueError (an input).
    """
    file = next((above for above in path.parents if above.is_file()), None)
    if file is not None:
        raise NotADirectoryError(f"cannot write {path}: {file} is a file, not a folder")
    same = [read_from for read_from in inputs if path.exists() and read_from.exists() and path.samefile(read_from)]
    if same:
        raise ValueError(f"{path} is the same file as the input {same[0]}, which it would replace; name another file")
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"cannot write {path}: it is a device or a pipe, which would be replaced; name a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: no permission to write into {path.parent}")


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits. Raises FileNotFoundError if there is none."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def not_what_it_is_called(path: Path) -> str | None:
    """What was saved under this name instead of the file, if its first bytes tell: an empty file, a Git LFS pointer or
    an HTML page. None: none of them."""
    with open(path, "rb") as file:
        head = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "an empty file (an interrupted download or copy?)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull`, or download the file"
    if head.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page, not the file: the download was answered with an error or login page"
    return None


@dataclass(frozen=True)
class ArrayHeader:
    """What the first bytes of a .npy file say: shape, order and dtype of the array, and the bytes before its data."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype
    num_bytes: int


def read_array_header(stream: IO[bytes]) -> ArrayHeader:
    """The header of a .npy file, which is left at the first byte of its data. Raises ValueError for anything else."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    return ArrayHeader(shape, is_fortran, dtype, stream.tell())


class Seekable(Protocol):
    """What is read here and there: a file, or bytes that lie elsewhere."""

    def seek(self, offset: int, /) -> object: ...

    def read(self, num_bytes: int, /) -> bytes: ...


def member_offset(file: Seekable, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member of a zip file begin: its local header's extra field may differ from the directory's.

    Raises ValueError if the header lies outside of the file, or is that of another member.
    """
    file.seek(max(member.header_offset, 0))
    header = file.read(30)
    if member.header_offset < 0 or len(header) < 30:
        raise ValueError(f"{member.filename[:100]!r} lies outside of the file: truncated or damaged")
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:], "little")
    name = member.orig_filename.encode("utf-8" if member.flag_bits & UTF_8 else "cp437")
    if header[:4] != b"PK\x03\x04" or file.read(name_length) != name:
        raise ValueError(f"{member.filename[:100]!r} is not where the directory of the zip file says: damaged")
    return member.header_offset + 30 + name_length + extra_length


def data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """`member_offset` in the zip file `path`."""
    with path.open("rb") as file:
        return member_offset(file, member)


def map_array(path: Path, header: ArrayHeader, offset: int = 0) -> np.ndarray:
    """The array of a .npy file that begins at `offset` of `path`, as a read-only memory map."""
    start = offset + header.num_bytes
    if header.dtype.hasobject:
        raise ValueError(f"{path}: the array holds Python objects (a pickle), which are never read")
    size = int(np.prod(header.shape, dtype=np.int64)) * header.dtype.itemsize
    if start + size > path.stat().st_size:
        raise ValueError(f"{path}: the array {header.shape} needs {size} bytes, the file ends before (truncated?)")
    order: Literal["F", "C"] = "F" if header.is_fortran else "C"
    return np.memmap(path, header.dtype, mode="r", offset=start, shape=header.shape, order=order)


def find_member(path: Path, key: str) -> tuple[ArrayHeader, int]:
    """(header, offset) of an array of an uncompressed .npz, for `map_array`."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path}: {key} is compressed, expected an uncompressed .npz")
        with archive.open(member) as stream:
            header = read_array_header(stream)
    return header, data_offset(path, member)


def map_member(path: Path, key: str) -> np.ndarray:
    """An array of an uncompressed .npz as a read-only memory map (numpy itself would read it whole)."""
    header, offset = find_member(path, key)
    return map_array(path, header, offset)


def check_zip(path: Path) -> None:
    """Compare every byte of a zip's members (npz, torch) with the checksum (CRC-32) that was stored beside them.

    Raises ValueError if one differs or if the file is no zip, FileNotFoundError if there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (*UNREADABLE, struct.error, OverflowError, MemoryError) as error:
        raise ValueError(f"no whole zip file: {error}") from error
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged!r} is wrong")
