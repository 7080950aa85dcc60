"""Hostile checkpoints, seeded: every one is read or refused in one line, within two seconds and a gigabyte, and nothing
of it runs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from neon.checkpoints import checkpoint
from neon.checkpoints.describe import describe
from neon.family import resolve, shipped
from tests.fuzz.guard import content, found, kept, watched
from tests.fuzz.hostile_files import MAKERS, ODD

CASES = {"pickle": 500, "zip": 500, "safetensors": 700, "index": 100}
SMALL = Path(__file__).parents[2] / "demo/small"


def read_tensors(path: Path) -> None:
    tensors = checkpoint.read(path, weights="auto").tensors
    assert all(value.numel() < 1e6 for value in tensors.values())


def read_all(path: Path) -> None:
    """What `info`, `merge` and `convert` do with an input. A refusal is one line that names the file."""
    for work in (describe, read_tensors):
        message = refused = ""
        try:
            work(path)
        except ValueError as error:
            message, refused = str(error), path.name
        except FileNotFoundError as error:  # a shard that an index names
            message, refused = str(error), str(path.parent)
        assert refused in message
        assert len(message) < 2000
        assert not message or message.isprintable()


@pytest.fixture(autouse=True, scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Modules that the readers import once are imported before anyone watches."""
    for kind, make in MAKERS.items():
        for seed in range(30):
            path = tmp_path_factory.mktemp(kind) / "case"
            path.write_bytes(make(random.Random(-1 - seed)))
            try:
                read_all(path)
            except Exception:  # the test itself will say what is wrong
                continue


def case(tmp_path: Path, kind: str, made: bytes) -> None:
    path = tmp_path / "case"
    path.write_bytes(made)
    with kept("hostile checkpoint", kind=kind, content=made), watched():
        read_all(path)


@pytest.mark.parametrize("kind", MAKERS)
def test_hostile_files_are_refused_quickly_and_inertly(tmp_path: Path, kind: str) -> None:
    for before in found("hostile checkpoint"):
        if before["kind"] == kind:
            case(tmp_path, kind, content(before["content"]))
    for seed in range(CASES[kind]):
        case(tmp_path, kind, MAKERS[kind](random.Random(seed)))


ABSURD = [*ODD, 10**7, 10**12, [1] * 100_000, 2.5]


@pytest.mark.parametrize("family", shipped())
def test_absurd_arguments_of_networks_are_refused_quickly(family: str) -> None:
    """Every constructor argument in a file, with odd values: a network is built, or the file is named."""
    kind = resolve(family)
    whole = checkpoint.read(SMALL / family / "model.safetensors")
    kind.load(whole)
    rng = random.Random(0)
    refused = 0
    for key in whole.arch:
        for index in rng.sample(range(len(ABSURD)), 6):
            with kept("absurd arch", family=family, key=key, value=index), watched():
                message = ""
                try:
                    kind.load(replace(whole, arch={**whole.arch, key: ABSURD[index]}))
                except ValueError as error:
                    message = str(error)
                refused += bool(message)
                assert not message or "model.safetensors" in message or f"arch.{key}" in message
                assert len(message) < 1000
    assert refused > len(whole.arch)
