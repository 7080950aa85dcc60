"""Run folders with damaged files, seeded: the same table and the same merged file, bit for bit, or one line that names
the file. Never other numbers. Two seconds of work, a gigabyte, nothing of a file runs."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from neon.cli.messages import USER_ERRORS
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.report import page
from neon.runtime.distributed import World
from neon.store import records
from tests.core.test_run import without_times
from tests.fuzz.damage import KINDS, damaged
from tests.fuzz.guard import found, kept, watched

SMALL = [
    "synth.num_images=12", "synth.shard_images=6", "finetune.images=32", "finetune.snapshot_images=16",
    "select.w=[0.5]", "select.num_images=8", "select.strategy=grid", "select.cfg_scale=[1.0]", "select.snapshots=last",
    "report.num_images=8", "report.num_shown=2", "report.cfg_scale=1.0",
]  # fmt: skip
OWN_WORK = frozenset({"os.mkdir", "compile"})
"""A run makes folders, and parses headers of arrays and the family's source without executing them."""
QUICK = 24
"""Cases of the quick test, of some 150."""


def finish(config: Path, folder: Path) -> tuple[object, bytes]:
    """The table and the merged file."""
    result = Run(load(config, SMALL), folder, World()).all()
    return json.loads(json.dumps(without_times(result))), (folder / "neon.safetensors").read_bytes()


@dataclass(frozen=True)
class Folders:
    """whole: a finished run and two half-done ones by name; end: how all of them end."""

    config: Path
    whole: dict[str, Path]
    end: tuple[object, bytes]


@pytest.fixture
def folders(line_config, tmp_path, monkeypatch) -> Folders:
    """A finished run, one killed in the middle of a point, one killed in the middle of S; and how all of them end."""
    monkeypatch.setattr(page, "write_page", lambda *_: None)  # drawn anew in any case
    monkeypatch.setattr(records.Saver, "is_due", property(lambda self: True))
    made = {name: tmp_path / name for name in ("finished", "in a point", "in S")}
    end = finish(line_config, made["finished"])
    with monkeypatch.context() as patch:
        save, saved = records.save_state, []

        def killed_in_a_point(state: object, path: Path) -> None:
            save(state, path)
            saved.append(path)
            if "partial" in str(path):
                raise KeyboardInterrupt

        patch.setattr(records, "save_state", killed_in_a_point)
        with pytest.raises(KeyboardInterrupt):
            finish(line_config, made["in a point"])
    with monkeypatch.context() as patch:
        patch.setattr("neon.store.filling._assemble", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(line_config, made["in S"])
    return Folders(line_config, made, end)


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def files_of(folder: Path) -> list[str]:
    derived = {".lock", "report.html", "report.png", "result.json", "neon.safetensors"}  # written anew, never read
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in derived)


def cases_of(folders: Folders) -> list[tuple[str, str, str]]:
    return [
        (which, name, kind)
        for which, whole in folders.whole.items()
        for name in files_of(whole)
        for kind in sorted(KINDS)
    ]


def check(folders: Folders, which: str, name: str, kind: str, seed: int) -> str:
    copy = folders.config.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folders.whole[which], copy)
    path = copy / name
    path.write_bytes(damaged(path.read_bytes(), kind, seed))
    with kept("damaged run", which=which, name=name, kind=kind, seed=seed):
        try:
            with watched(OWN_WORK):
                made = finish(folders.config, copy)
        except USER_ERRORS as error:
            message = str(error)
            assert path.name in message, f"does not name the file: {message}"
            assert "\n" not in message, f"more than one line: {message}"
            assert len(message) < 1000
            return "named"
        assert made == folders.end, "another result"
        return "same"


def test_no_damage_changes_a_number(folders):
    cases = cases_of(folders)
    kinds = {Path(name).parts[0].partition("-")[0] for _, name, _ in cases}
    assert kinds == {"synth", "finetune", "ledger.jsonl", "shown", "features", "partial", "seconds.json"}
    for before in found("damaged run"):
        check(folders, **before)
    chosen = random.Random(0).sample(cases, QUICK)
    outcomes = {check(folders, *case, seed) for seed, case in enumerate(chosen)}
    assert outcomes == {"named", "same"}


@pytest.mark.slow
def test_no_damage_to_any_file_changes_a_number(folders):
    """Every file of the three folders, every kind of damage, at three places each."""
    for seed, case in enumerate(3 * cases_of(folders)):
        check(folders, *case, seed)
