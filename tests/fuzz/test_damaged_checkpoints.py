"""Damaged checkpoints, seeded, read into the network that they belong to. What holds depends on the format:

* torch.save archives and distributed checkpoints carry checksums: the same weights, or an error that names the file.
* safetensors carry none. Damage outside of the numbers gives the same weights or an error; a damaged number is read as
  what now stands there, and nothing else changes (runs keep hashes of their own for that: tests/core/test_damage.py).
* Pickles carry none, and their numbers lie between the instructions: names and shapes are right, or an error.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from neon.checkpoints import checkpoint
from tests.core import pickles
from tests.fuzz.damage import KINDS, damaged
from tests.fuzz.guard import found, kept, watched

CASES = 16
"""Of every kind of damage, for every file of every format."""


def state() -> dict[str, torch.Tensor]:
    return dict(pickles.network().state_dict())


def write_ours(folder: Path) -> None:
    checkpoint.write(
        folder / "a.safetensors", state(), metadata={"family": "edm", "arch": {"x": 0.5}, "weights": "ema"}
    )


def write_theirs(folder: Path) -> None:
    safetensors.torch.save_file(state(), folder / "a.safetensors")


def write_older(folder: Path) -> None:
    torch.save(state(), folder / "a.pth", _use_new_zipfile_serialization=False)


def write_shards(folder: Path) -> None:
    names = list(state())
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, held in parts.items():
        safetensors.torch.save_file({name: state()[name] for name in held}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / "index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_distributed(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.save(state(), checkpoint_id=folder)


def write_module(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        module = pickles.persistent_module(pickles.network(), "EDMPrecond", {})
        pickles.write(patch, folder / "a.pkl", {"ema": module})


FORMATS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "ours": ("a.safetensors", "structure", write_ours),
    "safetensors": ("a.safetensors", "structure", write_theirs),
    "shards": ("index.json", "structure", write_shards),
    "archive": ("a.pth", "all", lambda folder: torch.save({"ema": state()}, folder / "a.pth")),
    "distributed": ("", "all", write_distributed),
    "older torch": ("a.pth", "names", write_older),
    "module": ("a.pkl", "names", write_module),
}  # fmt: skip
"""format -> (what is read, what its checks cover, how it is written)."""


def weights(path: Path) -> dict[str, torch.Tensor]:
    model = pickles.network()
    for value in model.state_dict().values():
        value.zero_()
    checkpoint.read(path, weights="auto").load_into(model)
    return dict(model.state_dict())


def is_number(file: Path, whole: bytes, now: bytes) -> bool:
    """Whether only bytes of numbers of a safetensors file changed."""
    header = 8 + int.from_bytes(whole[:8], "little")
    return file.suffix == ".safetensors" and len(now) == len(whole) and now[:header] == whole[:header]


def check(folder: Path, copy: Path, format: str, file: str, kind: str, seed: int) -> str:
    entry, covered, _ = FORMATS[format]
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    whole = (copy / file).read_bytes()
    now = damaged(whole, kind, seed)
    (copy / file).write_bytes(now)
    with kept("damaged checkpoint", format=format, file=file, kind=kind, seed=seed):
        try:
            with watched():
                read, message = weights(copy / entry), ""
        except (ValueError, FileNotFoundError) as error:
            read, message = {}, str(error)
        if message:
            assert str(copy) in message
            assert message.isprintable()
            assert len(message) < 2000
            return "refused"
        right = state()
        if all(torch.equal(read[name], right[name]) for name in right):
            return "same"
        if covered == "structure":
            assert is_number(copy / file, whole, now), "other weights"
            there = b"".join(path.read_bytes() for path in copy.iterdir())
            assert all(value.numpy().tobytes() in there for value in read.values()), "numbers that stand nowhere"
            return "other numbers"
        assert covered == "names", "other weights"
        return "other numbers"


@pytest.mark.parametrize("format", FORMATS)
def test_no_damage_changes_weights_silently(tmp_path: Path, format: str) -> None:
    folder, copy = tmp_path / "whole", tmp_path / "copy"
    folder.mkdir()
    entry, covered, write = FORMATS[format]
    write(folder)
    assert all(torch.equal(value, state()[name]) for name, value in weights(folder / entry).items())
    for before in found("damaged checkpoint"):
        if before["format"] == format:
            check(folder, copy, **before)
    rng = random.Random(format)
    outcomes = set()
    for file in sorted(path.name for path in folder.iterdir()):
        for kind in KINDS:
            for _ in range(CASES):
                outcomes.add(check(folder, copy, format, file, kind, rng.randrange(2**32)))
    assert "refused" in outcomes
    assert ("other numbers" in outcomes) == (covered != "all")
