"""Where `neon merge` writes: names for several w, files and folders that are whole or not there."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from neon.merge import check_w
from neon.store import files

FORMULA = "theta_base - w (theta_syn - theta_base)"


def output_names(out: Path, w: Sequence[float]) -> list[Path]:
    """One name per w: `out`, or out_w0.5.safetensors and so on. Raises ValueError for the same twice or no number."""
    for value in w:
        check_w(value)
    if len(w) == 1:
        return [out]
    stem, suffix = (out.stem, out.suffix) if out.suffix == ".safetensors" else (out.name, "")
    names = [out.with_name(f"{stem}_w{value:g}{suffix}") for value in w]
    if len(set(names)) < len(names):
        raise ValueError(f"--w names a value twice: {', '.join(f'{value:g}' for value in w)}")
    return names


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that gets its name when the block ends without an error, and is removed otherwise."""
    path = path.absolute()
    files.remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        with suppress(OSError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with files.named_in_errors(path):
            yield temporary
        files.sync_folder(temporary)
        os.replace(temporary, path)
        files.sync_folder(path.parent)
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """The path of an empty file that takes the place of `path` when the block ends without an error."""
    files.remove_abandoned(path)
    with files.replacing(path) as file:
        yield Path(file.name)
