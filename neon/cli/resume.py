"""Where FAMILY/calculate_fid.py keeps what it has computed, so that a killed command goes on when it is run again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from fid.weights import cache_folder
from neon.runtime.distributed import World
from neon.store import files, records

LOG = logging.getLogger(__name__)
NO_MATTER = ("timeout", "device")
"""Options without influence on any value."""


@contextmanager
def pass_folder(ranks: World, measured_by: Mapping[str, object]) -> Iterator[Path | None]:
    """A folder of the cache that belongs to this command line, the files that it names, what it measures with and the
    versions; removed at the end.

    None, with a warning, where the cache cannot be written: then a killed command begins again.
    """
    folder = ranks.broadcast(_folder([measured_by, records.made_with(ranks)]) if ranks.is_main else None)
    if folder is None:
        yield None
    elif ranks.is_main:
        with files.folder_lock(folder):
            yield folder
            shutil.rmtree(folder)
    else:
        yield folder


def _folder(protocol: Sequence[object]) -> Path | None:
    try:
        folder = cache_folder() / "passes" / _key(protocol)[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        LOG.warning("this command cannot go on if it is killed: %s", error)
        return None
    return folder


def _key(protocol: Sequence[object]) -> str:
    options = {k: v for k, v in click.get_current_context().params.items() if k not in NO_MATTER}
    named = {k: files.sha256_of(v) for k, v in options.items() if isinstance(v, Path) and v.is_file()}
    command = click.get_current_context().command
    return records.key_of([*protocol, command.help, {k: str(v) for k, v in options.items()}, named])
