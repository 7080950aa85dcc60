"""The same run on 1, 2 and 3 ranks (gloo): the same noise, labels and count, weights and numbers up to rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch

from neon.checkpoints import checkpoint
from neon.runtime.distributed import World
from tests.commands import start, started


def run_on(ranks: int, config: Path, folder: Path, batch: int) -> dict:
    options = ("--out", folder, "--device", "cpu", "--set", f"sampling.batch={batch}")
    return started("-m", "neon", "run", config, *options, ranks=ranks)


def test_world_sizes_agree(line_config, tmp_path):
    results = {
        ranks: run_on(ranks, line_config, tmp_path / str(ranks), batch) for ranks, batch in ((1, 7), (2, 5), (3, 50))
    }
    one = results[1]
    for ranks in (2, 3):
        other = results[ranks]
        for shard in sorted((tmp_path / "1/synth").glob("shard-*.npz")):
            with np.load(shard) as a, np.load(tmp_path / str(ranks) / "synth" / shard.name) as b:
                assert all(np.array_equal(a[key], b[key]) for key in ("codes", "labels", "index"))
        for shot in sorted((tmp_path / "1/finetune").glob("snapshot-*.safetensors")):
            a = checkpoint.read(shot, weights="any").tensors["mean"]
            b = checkpoint.read(tmp_path / str(ranks) / "finetune" / shot.name, weights="any").tensors["mean"]
            assert (a - b).abs().max() <= 1e-5 * a.abs().max()
        assert other["ranks"] == ranks
        assert (other["w"], other["cfg_scale"]) == (one["w"], one["cfg_scale"])
        for name, row in one["rows"].items():
            for metric, value in row["metrics"].items():
                assert other["rows"][name]["metrics"][metric] == pytest.approx(value, rel=0.01)


def test_no_image_is_padded_or_twice():
    for num_images in (1, 2, 7, 50, 101):
        for size in (1, 2, 3, 8):
            for batch in (1, 4, 64):
                shares = [World(rank, size).batches(num_images, batch) for rank in range(size)]
                everything = sorted(i for share in shares for part in share for i in part)
                assert everything == list(range(num_images))
                assert all(len(part) <= batch for share in shares for part in share)
                counts = [sum(map(len, share)) for share in shares]
                assert max(counts) - min(counts) <= batch


SUMS = """
import torch
from neon.runtime.distributed import world
with world("cpu") as w:
    a, b = torch.full((3,), float(w.rank + 1), dtype=torch.float64), torch.tensor([w.rank + 1])
    w.sum([a, b])
    assert a.tolist() == [6.0] * 3 and b.item() == 6
    assert w.gather(w.rank * 10) == [0, 10, 20]
    assert w.broadcast(f"from {w.rank}") == "from 0"
    w.barrier()
"""


def test_sums_gathers_broadcasts(tmp_path):
    (tmp_path / "sums.py").write_text(SUMS)
    done = start(tmp_path / "sums.py", ranks=3)
    assert done.returncode == 0, done.stderr


DIES = """
import os, signal
from neon.runtime.distributed import world
with world("cpu", timeout_s=10) as w:
    if w.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    w.barrier()
    w.barrier()
"""


def test_a_killed_rank_ends_the_others_by_name(tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    done = start(tmp_path / "dies.py", ranks=2, timeout=60)
    assert done.returncode != 0
    assert "local_rank: 1" in done.stderr or "rank : 1" in done.stderr or "rank      : 1" in done.stderr


def test_a_user_error_on_ranks_is_one_line_and_not_success(line_config, tmp_path):
    options = ("--out", tmp_path / "run", "--device", "cpu", "--set", "report.num_images=1")
    done = start("-m", "neon", "run", line_config, *options, ranks=2)
    assert done.returncode != 0
    assert "num_images must be >= 2" in done.stderr


def test_alone_without_a_process_group():
    world = World()
    value = torch.ones(2)
    world.sum([value])
    world.barrier()
    assert (value.tolist(), world.gather(5), world.broadcast("x")) == ([1.0, 1.0], [5], "x")
