"""Folders of torch.distributed.checkpoint, written by torch itself on one and on two ranks."""

from __future__ import annotations

import enum
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from neon.checkpoints import checkpoint
from neon.checkpoints.describe import describe
from neon.merge_files.merging import merge
from neon.merge_files.pairing import Request

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(6, 5, generator=g),
        "a.bias": torch.randn(3, generator=g).bfloat16(),
        "norm.running_var": torch.rand(2, generator=g),
        "norm.num_batches_tracked": torch.tensor(seed),
    }


def saved(folder: Path, seed: int) -> Path:
    optimizer = {"state": {"a.weight": {"exp_avg": torch.zeros(6, 5)}}}
    dcp.save({"model": state(seed), "ema": state(seed + 10), "optimizer": optimizer, "step": 5}, checkpoint_id=folder)
    return folder


def assert_state(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_sets_of_a_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", 0)
    assert_state(checkpoint.read(folder, weights="raw").tensors, state(0))
    assert_state(checkpoint.read(folder, weights="ema").tensors, state(10))
    assert set(describe(folder / ".metadata")["weights"]) == {"raw", "ema"}
    out = tmp_path / "out.safetensors"
    merge(folder, saved(tmp_path / "synth", 1), out, Request(w=(1.5,), base_weights="raw", synth_weights="raw"))
    merged = checkpoint.read(out, weights="raw").tensors
    b, s = state(0)["a.weight"], state(1)["a.weight"]
    assert torch.equal(merged["a.weight"], torch.add(b, s - b, alpha=-1.5))
    assert torch.equal(merged["norm.running_var"], state(0)["norm.running_var"])


def test_a_folder_that_python_3_11_0_wrote(tmp_path: Path) -> None:
    """Until 3.11.3 a member of an enumeration was pickled as getattr(enumeration, name)."""
    folder = saved(tmp_path / "base", 0)

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: object) -> object:
            return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented

    metadata = pickle.loads((folder / ".metadata").read_bytes())  # the test's own, of two lines above
    with (folder / ".metadata").open("wb") as file:
        Pickler(file).dump(metadata)
    assert b"getattr" in (folder / ".metadata").read_bytes()
    assert_state(checkpoint.read(folder, weights="raw").tensors, state(0))


RANKS = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, Replicate, distribute_tensor
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
values = {"rows": torch.arange(35.0).reshape(7, 5), "columns": torch.arange(30.0).reshape(5, 6), "all": torch.ones(3)}
kinds = {"rows": Shard(0), "columns": Shard(1), "all": Replicate()}
dcp.save({"model": {n: distribute_tensor(v, mesh, [kinds[n]]) for n, v in values.items()}}, checkpoint_id=sys.argv[1])
os._exit(0)  # all is saved; what torch does at the end with a device mesh hangs in 2.5 and aborts now and then in 2.14
"""


def test_pieces_of_two_ranks_are_put_together(tmp_path: Path) -> None:
    script, folder = tmp_path / "save.py", tmp_path / "base"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, folder]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    found = checkpoint.read(folder, weights="auto").tensors
    assert torch.equal(found["rows"], torch.arange(35.0).reshape(7, 5))
    assert torch.equal(found["columns"], torch.arange(30.0).reshape(5, 6))
    assert torch.equal(found["all"], torch.ones(3))
    next(folder.glob("__1_*.distcp")).unlink()
    with pytest.raises(FileNotFoundError, match="__1_"):
        checkpoint.read(folder, weights="auto")


def damaged(folder: Path, change) -> Path:
    """The folder with another table of contents. torch's own classes are used to write it, never to read it here."""
    with (folder / ".metadata").open("rb") as file:
        table = pickle.load(file)  # our own file
    change(table)
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    return folder


def first(table):
    return next((index, info) for index, info in table.storage_data.items() if index.fqn == "model.a.weight")


def elsewhere(table, name: str) -> None:
    first(table)[1].relative_path = name


def beyond(table) -> None:
    first(table)[1].length = 10**9


def lost(table) -> None:
    del table.storage_data[first(table)[0]]
    for index in [index for index in table.storage_data if "model" in index.fqn or "ema" in index.fqn]:
        del table.storage_data[index]


def wider(table) -> None:
    table.state_dict_metadata["model.a.weight"].size = torch.Size([60, 5])


def endless(table) -> None:
    table.state_dict_metadata["model.a.weight"].size = [2**62, 2**62]


HOSTILE = {
    "outside": (lambda table: elsewhere(table, "../secret"), "not a plain file name"),
    "absolute": (lambda table: elsewhere(table, "/etc/passwd"), "not a plain file name"),
    "beyond": (beyond, "a piece ends at byte"),
    "lost": (lost, "no weights found"),
    "wider": (wider, "do not make it up"),
    "endless": (endless, "more numbers than any"),
    "no table": (lambda table: setattr(table, "storage_data", 5), "no weights found"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tables_of_contents(tmp_path: Path, kind: str) -> None:
    change, message = HOSTILE[kind]
    folder = damaged(saved(tmp_path / "base", 0), change)
    with pytest.raises(ValueError, match=message):
        checkpoint.read(folder, weights="raw")


def test_a_foreign_name_in_the_table_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", 0)
    (folder / ".metadata").write_bytes(b"\x80\x02cos\nsystem\n(U\x01xtR.")
    with pytest.raises(ValueError, match=r"refers to 'os\.system'"):
        checkpoint.read(folder, weights="raw")
