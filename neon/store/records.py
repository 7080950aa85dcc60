"""What a run writes about itself: JSON manifests and results, a line-by-line ledger, resumable state, and the check
that a half-done folder belongs to the config at hand."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

import neon
from neon.runtime.distributed import World
from neon.store import files


class DamagedError(ValueError):
    """A file of a run is not what was written; the message names it and says what to do."""


SEAL = "seal"
"""Key of a record's own SHA-256: a flipped byte in a manifest or a ledger line is found when it is read."""


def write_json(value: object, path: Path) -> None:
    files.write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """The object of a JSON file. Raises DamagedError naming the file if it holds none."""
    return _parsed(path.read_bytes(), str(path))


def _parsed(content: bytes, where: str) -> dict:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DamagedError(f"{where}: damaged, expected a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{where}: damaged, expected a JSON object, found a {type(value).__name__}")
    return value


def sealed(value: Mapping[str, object]) -> dict[str, object]:
    """A record with its own hash under `seal`."""
    plain = json.loads(json.dumps(value))
    return {**plain, SEAL: key_of(plain)}


def unsealed(value: dict, where: str) -> dict:
    """The record without its seal, if it is intact. Records of earlier versions have none."""
    seal = value.pop(SEAL, None)
    if seal is not None and seal != key_of(value):
        raise DamagedError(f"{where}: damaged, its content is not what was written")
    return value


def append_line(path: Path, value: Mapping[str, object]) -> None:
    """Add one sealed JSON line and flush it to the disk. On a full disk half of it may stay, for `repair_lines`."""
    with files.named_in_errors(path), path.open("a") as stream:
        stream.write(json.dumps(sealed(value)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    for listen in LISTENERS:
        listen(path, value)


LISTENERS: list[Callable[[Path, Mapping[str, object]], None]] = []
"""Called with every line that is appended: how a tracker (neon/pipeline/trackers.py) hears of a run."""


def write_lines(path: Path, values: Iterable[Mapping[str, object]]) -> None:
    """Replace all lines in one step."""
    files.write_text(path, "".join(json.dumps(sealed(value)) + "\n" for value in values))


def read_lines(path: Path) -> list[dict]:
    """All whole lines; a last line that a kill cut short is left out. Raises DamagedError naming a damaged line."""
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        where = f"{path}, line {number}"
        try:
            found.append(unsealed(_parsed(line, where), where))
        except DamagedError as error:
            raise DamagedError(
                f"{error}. Delete this line and run the same command again: what it says is computed again, the "
                "other lines are kept"
            ) from error
    return found


def repair_lines(path: Path) -> None:
    """Cut off a half-written last line, so that the next append starts a line of its own."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        with files.replacing(path) as stream:
            stream.write(content[: content.rfind(b"\n") + 1])


def save_state(state: object, path: Path) -> None:
    """torch.save in one step: the old state stays until the new one is whole."""
    with files.replacing(path) as stream:
        try:
            torch.save(state, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides a full disk behind a message about positions
                raise error.__context__ from None
            raise


def read_state(path: Path, device: torch.device | str = "cpu") -> dict:
    """What `save_state` wrote. Every byte is checked first (torch itself does not look at a file's checksums).

    Raises DamagedError naming the file if it is damaged.
    """
    try:
        files.check_zip(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except (ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise DamagedError(f"{path}: damaged, cannot be read as a saved state ({_first_line(error)})") from error
    if not isinstance(state, dict):
        raise DamagedError(f"{path}: damaged, expected a saved state, found a {type(state).__name__}")
    return state


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


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


LAYOUT = frozenset({"micro_batch", "shard_images", "channels_last", "num_shown"})
"""Keys that change memory, speed and the cutting of files, but nothing that a result depends on. With another value
of them a run goes on. `batch` is one too, in a table called `sampling` (in a recipe it is the batch of an update)."""
FREE = frozenset({"options", "objective", "arch", "model"})
"""Tables with names of a family's own; no key inside them is one of LAYOUT."""
ADDED = frozenset({"family_source", "data_sha256", "autoencoder_sha256"})
"""Keys that manifests of earlier versions lack. Where they are absent, nothing is known about them."""

RENAMED = {"label_dropout": "label_drop"}
"""Keys of an `objective` table in folders of earlier versions (IMM's)."""
RECIPES = ("finetune", "train")
"""Sections whose table is `recipe` in training states of earlier versions."""


def identity_of(value: object, inside: str = "") -> object:
    """A manifest, a recipe or a ledger entry without its keys of layout."""
    if isinstance(value, Mapping) and inside == "objective":
        return {RENAMED.get(key, key): item for key, item in value.items()}
    if isinstance(value, Mapping) and inside not in FREE:
        return {
            key: identity_of(item, key)
            for key, item in value.items()
            if key not in LAYOUT and not (key == "batch" and inside == "sampling")
        }
    return value


def made_with(world: World) -> dict[str, object]:
    """What a number was computed with, beside everything that it depends on."""
    versions = {"neon": neon.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"versions": versions, "device": str(world.device), "ranks": world.size}


def check_same(found: object, expected: object, where: Path) -> None:
    """Raise ValueError naming the first key in which a half-done folder differs from what this command would do."""
    found, expected = identity_of(json.loads(json.dumps(found))), identity_of(json.loads(json.dumps(expected)))
    difference = _difference(_recipe_named(found, expected), expected, "")
    if difference is not None:
        key, old, new = difference
        key = key.replace("sampling.options.", "sampling.")  # as the config has it
        raise ValueError(
            f"{where} was begun with another setting: {key} is {old!r} there and {new!r} now. "
            "Give back the old setting to continue, or choose another folder (--out)"
        )


def _recipe_named(found: object, expected: object) -> object:
    """`found` with its recipe under the section's name, as `expected` has it."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return found
    section = next((name for name in RECIPES if name in expected), "recipe")
    return {section if key == "recipe" else key: value for key, value in found.items()}


def _difference(found: object, expected: object, key: str) -> tuple[str, object, object] | None:
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in [*found, *(n for n in expected if n not in found)]:
            if name in ADDED and name not in found:
                continue
            inner = _difference(found.get(name), expected.get(name), f"{key}.{name}" if key else name)
            if inner is not None:
                return inner
        return None
    return None if found == expected else (key, found, expected)


def read_manifest(folder: Path) -> dict:
    """What `claim_folder` wrote. Raises DamagedError naming the file if it is damaged."""
    path = folder / "manifest.json"
    try:
        return unsealed(read_json(path), str(path))
    except DamagedError as error:
        raise DamagedError(
            f"{error}. If the config has not changed since {folder} was begun, delete this file and run the same "
            "command again: it is written anew, everything else is kept"
        ) from error


def claim_folder(folder: Path, manifest: Mapping[str, object], world: World) -> dict:
    """Write the folder's manifest, or check that the one that is there says the same. Returns the folder's own, whose
    keys of layout count."""
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "manifest.json").is_file():
            check_same(read_manifest(folder), manifest, folder)
        else:
            write_json(sealed(manifest), folder / "manifest.json")
    world.barrier()
    return read_manifest(folder)
