"""Files that are never half written, folders that one process owns, and hashes."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fid.files import check_writable, replacing, sha256_of, sync_folder

__all__ = [
    "FolderInUseError", "check_writable", "folder_lock", "replacing", "sha256_of", "sync_folder", "write_text",
]  # fmt: skip


class FolderInUseError(OSError):
    """Another process owns a folder; the message names it."""


def write_text(path: Path, content: str) -> None:
    """Replace the content of `path` in one step (UTF-8)."""
    with replacing(path) as file:
        file.write(content.encode())


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


def check_zip(path: Path) -> None:
    """Compare every byte of a zip's members (npz, torch) with the checksum (CRC-32) that was stored beside them.

    Raises ValueError if one differs or if the file is no zip.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds of errors at a damaged directory
        raise ValueError(f"no whole zip file: {error}") from error
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged!r} is wrong")
