"""The same run on 1, 2 and 3 ranks (gloo): the same noise, labels and count, weights and numbers up to rounding."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from neon.checkpoints import checkpoint
from neon.runtime.distributed import World
from neon.training.loop import train_step
from neon.training.recipe import Training
from neon.training.trainer import Trainer
from tests.commands import ROOT, start, started
from tests.core.line_family import Line, Mean, Objective


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


RANK = """
import atexit, os, signal, sys, time
atexit.register(print, "the interpreter's end", flush=True)  # before torch's: what is registered first runs last
import torch
from neon.runtime.distributed import world
with world("cpu", timeout_s=3) as w:
    w.barrier()
    if w.rank == {doomed}:
        {fate}
    {{"sum": lambda: w.sum([torch.ones(3)]), "gather": lambda: w.gather(1), "broadcast": lambda: w.broadcast(1),
      "barrier": w.barrier}}["{verb}"]()
    print("through", flush=True)
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def by_hand(folder: Path, ranks: int, **what: object) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of every rank, started as Slurm starts them: nobody else ends the ranks that wait."""
    (folder / "rank.py").write_text(RANK.format(**what))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, folder / "rank.py"],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "WORLD_SIZE": str(ranks), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    ends = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


@pytest.mark.parametrize("verb", ["sum", "gather", "broadcast", "barrier"])
def test_a_killed_rank_is_named_in_every_collective(tmp_path, verb):
    ends = by_hand(tmp_path, 3, doomed=1, fate=KILLED, verb=verb)
    for code, out, errors in (ends[0], ends[2]):
        assert (code, out) == (1, "")
        heard = "rank 1 of 3 is lost (no sign of life for ", "rank 0 of 3 ended: ", "the store of the ranks is gone"
        assert any(words in errors for words in heard)  # the last one: rank 2 was busy while rank 0 waited for it
    assert "rank 1 of 3 is lost" in ends[0][2] + ends[2][2]


def test_when_rank_0_is_killed_the_others_say_so(tmp_path):
    _, (code, out, errors) = by_hand(tmp_path, 2, doomed=0, fate=KILLED, verb="barrier")
    assert (code, out) == (1, "")
    assert "the store of the ranks is gone, and with it rank 0" in errors


def test_a_rank_that_fails_tells_the_others_why(tmp_path):
    (code, out, errors), _ = by_hand(tmp_path, 2, doomed=1, fate="raise ValueError('no such file: x')", verb="barrier")
    assert (code, out) == (1, "")
    assert "rank 1 of 2 ended: ValueError: no such file: x" in errors


def test_a_rank_with_an_error_leaves_before_the_interpreters_end(tmp_path):
    """There a living process group now and then aborts: -6 in place of exit code 1."""
    ends = by_hand(tmp_path, 2, doomed=1, fate="raise ValueError('no such file: x')", verb="barrier")
    assert [(code, out) for code, out, _ in ends] == [(1, "")] * 2
    assert "rank 1 of 2 stops: ValueError: no such file: x" in ends[1][2], "what was printed is not lost"


@pytest.mark.parametrize("verb", ["barrier", "sum"])
def test_a_rank_that_works_longer_than_the_timeout_is_waited_for(tmp_path, verb):
    ends = by_hand(tmp_path, 2, doomed=1, fate="time.sleep(9)", verb=verb)
    assert [(code, out) for code, out, _ in ends] == [(0, "through\nthe interpreter's end\n")] * 2, ends


def test_a_user_error_on_ranks_is_one_line_and_not_success(line_config, tmp_path):
    options = ("--out", tmp_path / "run", "--device", "cpu", "--set", "report.num_images=1")
    done = start("-m", "neon", "run", line_config, *options, ranks=2)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "num_images must be >= 2" in line]
    assert errors[0].startswith("Error: ")  # ours; torchrun adds its own report
    assert len(errors) == 2
    assert "Traceback (most recent call last):\n  File" not in done.stderr.split("torch/distributed/elastic")[0]


def test_alone_without_a_process_group():
    world = World()
    value = torch.ones(2)
    world.sum([value])
    world.barrier()
    assert (value.tolist(), world.gather(5), world.broadcast("x")) == ([1.0, 1.0], [5], "x")


class OneOfMany(World):
    """A rank whose sums hold its own share only."""

    def sum(self, tensors):
        pass


class Watched:
    """Ten images, and the indices that were read."""

    labels = torch.arange(10) % 3

    def __init__(self):
        self.was_read: list[int] = []

    def __len__(self) -> int:
        return 10

    def read(self, indices):
        self.was_read += indices
        return torch.arange(160, dtype=torch.uint8).view(10, 1, 4, 4)[list(indices)]


class Paired(Line):
    """Noise that depends on all images of the batch."""

    is_honest = True

    def draws_see_codes(self, how):
        return self.is_honest

    def draw(self, rng, codes, labels, how):
        return {"noise": super().draw(rng, codes, labels, how)["noise"] + codes.float().mean(0)}


class Centred(Paired):
    """Draws that are nothing but codes."""

    def draw(self, rng, codes, labels, how):
        return {"noise": codes.float() - codes.float().mean(0)}


def step(family: Line, rank: int, size: int) -> tuple[float, list[int]]:
    """(this rank's part of the loss, what it read) of one update."""
    recipe = Training(images=8, batch=8, lr=1e-3, micro_batch=3, objective=Objective())
    trainer = Trainer(family, Mean().requires_grad_(True), recipe, OneOfMany(rank, size))
    corpus = Watched()
    return train_step(trainer, corpus), corpus.was_read


def test_every_rank_reads_the_codes_of_its_own_share():
    whole, everything = step(Line(), 0, 1)
    parts, reads = zip(*(step(Line(), rank, 3) for rank in range(3)), strict=True)
    assert [index for read in reads for index in read] == everything
    assert [len(read) for read in reads] == [2, 3, 3]
    assert sum(parts) == pytest.approx(whole, rel=1e-6)


def test_draws_from_the_codes_are_made_for_the_whole_batch():
    whole, everything = step(Paired(), 0, 1)
    parts, reads = zip(*(step(Paired(), rank, 2) for rank in range(2)), strict=True)
    assert list(reads) == [everything, everything]
    assert sum(parts) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("family", [Paired(), Centred()], ids=lambda family: type(family).__name__)
def test_draws_from_codes_that_were_not_asked_for_are_refused(family, monkeypatch):
    monkeypatch.setattr(Paired, "is_honest", False)
    with pytest.raises(ValueError, match=r"\w+.draw computes .* `draws_see_codes`"):
        step(family, 0, 1)
