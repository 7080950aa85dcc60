"""Files of a run: they appear whole or not at all, a folder belongs to one process, and a file knows its hash."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch


class FolderInUseError(OSError):
    """Another process owns a folder; the message names it."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`; what the block writes there takes the place of `path` when it ends well.

    Until then `path` is untouched, and if the block raises nothing of it stays. The content is on the disk before the rename
    (a rename is atomic only within one file system, hence the same folder). Raises FileNotFoundError if there is no folder.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(text: str, path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(value: object, path: Path) -> None:
    write_text(json.dumps(value, indent=2) + "\n", path)


def save_torch(value: object, path: Path) -> None:
    """torch.save of tensors in plain containers; read it with torch.load(..., weights_only=True)."""
    with atomic(path) as temporary:
        torch.save(value, temporary)


def read_json(path: Path) -> dict[str, object]:
    """The JSON object of a file. Raises ValueError naming the file if it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it was edited or damaged") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def append_json_line(path: Path, line: Mapping[str, object]) -> None:
    """Add one line to a journal and put it on the disk. A kill may cut the last line short; `read_json_lines` drops that one."""
    with open(path, "ab+") as file:
        if file.tell() and not _ends_with_newline(path):
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read_json_lines(path: Path) -> list[dict]:
    """The lines of a journal, [] if there is none; a last line without its newline was cut by a kill and does not count.

    Raises ValueError naming file and line if any other line is not JSON.
    """
    if not path.is_file():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, text in enumerate(whole, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not valid JSON ({error}); it was edited or damaged") from error
    return lines


def check_same(found: object, wanted: object, folder: Path) -> None:
    """Raises ValueError naming the keys in which what is on disk differs from what the config asks for."""
    there, asked = flat(found), flat(wanted)
    differing = sorted(key for key in there.keys() | asked.keys() if there.get(key, ABSENT) != asked.get(key, ABSENT))
    if differing:
        shown = "; ".join(f"{key}: there {there.get(key, ABSENT)}, asked {asked.get(key, ABSENT)}" for key in differing[:3])
        raise ValueError(
            f"{folder} was made with other settings ({len(differing)} differ): {shown}. "
            "Go back to those settings, or choose another folder (or remove this one) to start afresh"
        )


ABSENT = "nothing"


def flat(value: object, prefix: str = "") -> dict[str, str]:
    """{dotted key: canonical JSON} of nested mappings; tuples and lists count as equal, as they do on disk."""
    if isinstance(value, Mapping) and value:
        return {key: text for name, inner in value.items() for key, text in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()}
    return {prefix: json.dumps(value, sort_keys=True)}


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Own `folder` (made if missing) for the length of the block. The lock dies with its process: a kill leaves nothing behind.

    Raises FolderInUseError, which names the holder, if another process (or another block of this one) owns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "a process that has not yet written its name"
            raise FolderInUseError(f"{folder} is in use by {holder}. Wait for it, stop it, or choose another folder") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} ({' '.join(sys.argv)[:200]})\n")
        file.flush()
        yield


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
