"""Files that are never half written, folders that one process owns, and hashes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class FolderInUseError(OSError):
    """Another process owns a folder; the message names it."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an error; until then `path` is
    untouched.

    The temporary file lies in the same folder (a rename is atomic only within one file system), is on the disk before
    the rename, and is removed if the block raises. Raises FileNotFoundError if there is no such folder; an OSError of
    the
    writing itself (a full disk, a quota) names the path and says that what was there still is.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is not None:
            raise
        kept = "the old file is untouched" if path.exists() else "no half of it is left"
        advice = "Make room or choose another folder, then run the same command again"
        message = f"{error.strerror} while it was written; {kept}. {advice}"
        raise OSError(error.errno, message, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Replace the content of `path` in one step (UTF-8)."""
    with replacing(path) as file:
        file.write(content.encode())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Own `folder` (made if missing) for the length of the block. The lock dies with its process; the half-written
    temporary files of a killed holder are removed from the folder and its subfolders.

    Raises FolderInUseError, which names the holder, if another process (or another block of this one) owns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "a process that has not yet written its name"
            raise FolderInUseError(
                f"{folder} is in use by {holder}. Wait for it, stop it, or choose another folder"
            ) from error
        _remove_leftovers(folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} ({' '.join(sys.argv)[:200]})\n")
        file.flush()
        yield


def _remove_leftovers(folder: Path) -> None:
    """What `replacing` could not remove because its process was killed. Only the owner of the folder may do this."""
    for pattern in (".*.????????.tmp", "*/.*.????????.tmp"):
        for leftover in folder.glob(pattern):
            leftover.unlink()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
