"""Hostile checkpoints, seeded: every one is read or refused in one line, within two seconds and a gigabyte, and nothing
of it runs. A case that was found is one line in `FOUND`: kind and seed make the file again."""

from __future__ import annotations

import codecs
import random
import resource
import time
from pathlib import Path

import pytest

from neon.checkpoints import checkpoint
from neon.checkpoints.describe import describe
from tests.fuzz.hostile_files import MAKERS
from tests.watching import watched

SECONDS = {"pickle": 16.0, "zip": 8.0, "safetensors": 5.0, "index": 1.0}  # 30 of CI's 60
LEAST = {"pickle": 900, "zip": 500, "safetensors": 500, "index": 100}
FOUND: list[tuple[str, int]] = []


def read_all(path: Path) -> None:
    """What `info`, `merge` and `convert` do with an input. A refusal is one line that names the file."""
    for work in (describe, lambda path: checkpoint.read(path, weights="auto")):
        message = ""
        try:
            found = work(path)
        except (ValueError, FileNotFoundError) as error:  # the second: a shard that an index names
            message = str(error)
            refused = path.name if isinstance(error, ValueError) else str(path.parent)
        else:
            refused = ""
            if isinstance(found, checkpoint.Checkpoint):
                assert all(value.numel() < 1e6 for value in found.tensors.values())
        assert refused in message
        assert len(message) < 2000
        assert not message or message.isprintable()


def case(tmp_path: Path, kind: str, seed: int) -> None:
    path = tmp_path / "case"
    path.write_bytes(MAKERS[kind](random.Random(seed)))
    with watched():
        read_all(path)


@pytest.fixture(autouse=True, scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Modules that the readers import once are imported before anyone watches."""
    for codec in ("raw_unicode_escape", "unicode_escape", "latin-1", "cp437"):
        codecs.lookup(codec)
    for kind, make in MAKERS.items():
        for seed in range(30):
            path = tmp_path_factory.mktemp(kind) / "case"
            path.write_bytes(make(random.Random(-1 - seed)))
            try:
                read_all(path)
            except Exception:  # the test itself will say what is wrong
                continue


@pytest.mark.parametrize("kind", MAKERS)
def test_hostile_files_are_refused_quickly_and_inertly(tmp_path: Path, kind: str) -> None:
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end, seed = time.monotonic() + SECONDS[kind], 0
    while time.monotonic() < end or seed < LEAST[kind]:
        try:
            case(tmp_path, kind, seed)
        except BaseException as error:
            raise AssertionError(f"{kind} {seed}: {type(error).__name__}: {str(error)[:300]}") from error
        seed += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 1 << 20  # kB


@pytest.mark.parametrize(("kind", "seed"), FOUND)
def test_cases_that_were_found(tmp_path: Path, kind: str, seed: int) -> None:
    case(tmp_path, kind, seed)
