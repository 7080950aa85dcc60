"""What a run writes about itself: JSON manifests and results, a line-by-line ledger, resumable state, and the check
that a half-done folder belongs to the config at hand."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from neon.runtime.distributed import World
from neon.store import files


def write_json(value: object, path: Path) -> None:
    files.write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def append_line(path: Path, value: Mapping[str, object]) -> None:
    """Add one JSON line and flush it to the disk."""
    with path.open("a") as stream:
        stream.write(json.dumps(value) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(path: Path) -> list[dict]:
    """All whole lines; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def repair_lines(path: Path) -> None:
    """Cut off a half-written last line, so that the next append starts a line of its own."""
    if path.is_file() and not (text := path.read_text()).endswith("\n"):
        files.write_text(path, text[: text.rfind("\n") + 1])


def save_state(state: object, path: Path) -> None:
    """torch.save in one step: the old state stays until the new one is whole."""
    with files.replacing(path) as stream:
        try:
            torch.save(state, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides a full disk behind a message about positions
                raise error.__context__ from None
            raise


class Saver:
    """Saves a state into one file as often as 5 % of the time allows: a kill loses at most 20 times what saving
    takes."""

    SHARE_OF_TIME = 0.05

    def __init__(self, path: Path):
        self.path = path
        self._saved_at, self._took_s = time.monotonic(), 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._saved_at > self._took_s / self.SHARE_OF_TIME

    def save(self, state: object) -> None:
        started = time.monotonic()
        save_state(state, self.path)
        self._saved_at = time.monotonic()
        self._took_s = self._saved_at - started


def key_of(value: object) -> str:
    """SHA-256 of the canonical JSON: the same for equal values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_same(found: object, expected: object, where: Path) -> None:
    """Raise ValueError naming the first key in which a half-done folder differs from what this command would do."""
    found, expected = json.loads(json.dumps(found)), json.loads(json.dumps(expected))
    difference = _difference(found, expected, "")
    if difference is not None:
        key, old, new = difference
        raise ValueError(
            f"{where} was begun with another setting: {key} is {old!r} there and {new!r} now. "
            "Give back the old setting to continue, or choose another --out"
        )


def _difference(found: object, expected: object, key: str) -> tuple[str, object, object] | None:
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in [*found, *(n for n in expected if n not in found)]:
            inner = _difference(found.get(name), expected.get(name), f"{key}.{name}" if key else name)
            if inner is not None:
                return inner
        return None
    return None if found == expected else (key, found, expected)


def claim_folder(folder: Path, manifest: Mapping[str, object], world: World) -> None:
    """Write the folder's manifest, or check that the one that is there says the same."""
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "manifest.json"
        if path.is_file():
            check_same(read_json(path), manifest, folder)
        else:
            write_json(manifest, path)
    world.barrier()
