"""Run folders with damaged files, seeded: the same numbers, or one line that names the file. Never other numbers.

A case that was found is one line in `FOUND`: folder, file, kind and seed make it again.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from neon.cli.messages import USER_ERRORS
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.report import page
from neon.runtime.distributed import World
from neon.store import records
from tests.core.test_run import without_times

SECONDS = 15.0
SMALL = [
    "synth.num_images=12", "synth.shard_images=6", "finetune.images=32", "finetune.snapshot_images=16",
    "select.w=[0.5]", "select.num_images=8", "select.strategy=grid", "select.cfg_scale=[1.0]", "select.snapshots=last",
    "report.num_images=8", "report.num_shown=2", "report.cfg_scale=1.0",
]  # fmt: skip
FOUND: list[tuple[str, str, str, int]] = []


def flip(data: bytearray, rng: random.Random) -> bytearray:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def zero(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data) + 1)
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    return data


KINDS: dict[str, Callable[[bytearray, random.Random], bytearray]] = {
    "flip": flip,
    "zero": zero,
    "cut": lambda data, rng: data[: rng.randrange(len(data) + 1)],
    "empty": lambda data, rng: bytearray(),
    "garbage": lambda data, rng: bytearray(rng.randbytes(rng.randrange(1, 400))),
}


def finish(config: Path, folder: Path) -> tuple[object, bytes]:
    """The table and the merged file."""
    result = Run(load(config, SMALL), folder, World()).all()
    return json.loads(json.dumps(without_times(result))), (folder / "neon.safetensors").read_bytes()


@pytest.fixture
def folders(line_config, tmp_path, monkeypatch) -> tuple[Path, dict[str, Path], tuple[object, bytes]]:
    """A finished run, one killed in the middle of a point, one killed in the middle of S; and how all of them end."""
    monkeypatch.setattr(page, "write_page", lambda *_: None)  # drawn anew in any case
    monkeypatch.setattr(records.Saver, "is_due", property(lambda self: True))
    found = {name: tmp_path / name for name in ("finished", "in a point", "in S")}
    end = finish(line_config, found["finished"])
    with monkeypatch.context() as patch:
        save, saved = records.save_state, []

        def killed_in_a_point(state: object, path: Path) -> None:
            save(state, path)
            saved.append(path)
            if "partial" in str(path):
                raise KeyboardInterrupt

        patch.setattr(records, "save_state", killed_in_a_point)
        with pytest.raises(KeyboardInterrupt):
            finish(line_config, found["in a point"])
    with monkeypatch.context() as patch:
        patch.setattr("neon.store.filling._assemble", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(line_config, found["in S"])
    return line_config, found, end


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def files_of(folder: Path) -> list[str]:
    derived = {".lock", "report.html", "report.png", "result.json", "neon.safetensors"}  # written anew, never read
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in derived)


def check(config: Path, whole: Path, copy: Path, end: tuple[object, bytes], case: tuple[str, str, int]) -> str:
    name, kind, seed = case
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    path = copy / name
    path.write_bytes(bytes(KINDS[kind](bytearray(path.read_bytes()), random.Random(seed))))
    try:
        found = finish(config, copy)
    except USER_ERRORS as error:
        message = str(error)
        assert path.name in message, f"{case}: does not name the file: {message}"
        assert "\n" not in message, f"{case}: more than one line: {message}"
        assert len(message) < 1000
        return "named"
    assert found == end, f"{case}: another result"
    return "same"


def test_no_damage_changes_a_number(folders, tmp_path):
    config, wholes, end = folders
    cases = [
        (which, name, kind) for which, folder in wholes.items() for name in files_of(folder) for kind in sorted(KINDS)
    ]
    random.Random(0).shuffle(cases)
    for which, name, kind, seed in FOUND:
        check(config, wholes[which], tmp_path / "copy", end, (name, kind, seed))
    outcomes = []
    until = time.monotonic() + SECONDS
    for seed, (which, name, kind) in enumerate(cases):
        outcomes.append(check(config, wholes[which], tmp_path / "copy", end, (name, kind, seed)))
        if time.monotonic() > until:
            break
    assert set(outcomes) == {"named", "same"}
