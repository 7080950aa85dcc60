"""Files that are never half written, folders that one process owns, and hashes."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fid.files import (
    check_writable,
    check_zip,
    named_in_errors,
    remove_abandoned,
    replacing,
    sha256_of,
    sync_folder,
)

__all__ = [
    "FolderInUseError", "check_writable", "check_zip", "folder_lock", "named_in_errors", "remove_abandoned",
    "replacing", "sha256_of", "sync_folder", "write_text",
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
    temporary files of a killed holder are removed from the folder and everything below it.

    Raises FolderInUseError, which names the holder, if another process (or another block of this one) owns it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{folder} cannot be a folder: a file is in its place; name another folder") from error
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
    for leftover in folder.rglob(".*.????????.tmp"):
        leftover.unlink()
