"""The search inside a run, on the smallest family: its ledger, its budget, its controls, kills and refusals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fid.frechet import Gaussian, frechet_distance
from fid.reference import read_reference
from neon.checkpoints import checkpoint
from neon.cli.main import main
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.runtime.distributed import World
from neon.search import choose
from neon.search.options import Select
from neon.search.points import Point, Score
from neon.seeds import Rng
from tests.commands import ROOT, invoke, last_object, start, started
from tests.core.line_family import Line, Sampling

SEARCH = (
    "select.strategy=search",
    "select.num_images=120",
    "select.snapshots=last",
    "report.num_images=400",
    "synth.cfg_scale=0.5",  # S is too grey, the base a little: moving away from S helps
)


def run(config: Path, folder: Path, *overrides: str) -> dict:
    return Run(load(config, (*SEARCH, *overrides)), folder, World()).all()


def ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "merged", "costs")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def test_a_run_searches_within_its_budget_and_reports_the_controls(line_config, tmp_path):
    found = run(line_config, tmp_path / "run")
    select = found["select"]
    assert select["strategy"] == "search"
    assert set(found["rows"]) == {"base", "self-trained", "random direction", "neon"}
    assert found["rows"]["neon"]["w"] == found["w"] == select["chosen"]["w"]
    first_seeds = {line["block"]["first_seed"] for line in ledger(tmp_path / "run")}
    assert first_seeds >= {1000, 2000}
    spent = sum(line["block"]["num_images"] for line in ledger(tmp_path / "run") if line["block"]["first_seed"] < 2000)
    assert spent == select["images"] <= select["budget_images"]
    assert {(p["w"], p["cfg_scale"]) for p in select["points"]} >= {(0.0, 1.0), (0.0, 1.2)}  # the base at both ends
    assert 1.0 <= found["rows"]["base"]["cfg_scale"] <= 1.2
    error = found["difference"]["error"]
    assert 0 < error < found["rows"]["base"]["error"] + found["rows"]["neon"]["error"]  # the same noise


def test_a_finished_search_repeats_nothing_and_a_larger_budget_goes_on(line_config, tmp_path):
    tight = ("select.start_images=30", "select.budget_images=200")
    first = run(line_config, tmp_path / "run", *tight)
    lines = ledger(tmp_path / "run")
    again = run(line_config, tmp_path / "run", *tight)
    assert ledger(tmp_path / "run") == lines
    assert without_times(again) == without_times(first)
    more = run(line_config, tmp_path / "run", "select.start_images=30", "select.budget_images=2000")
    assert ledger(tmp_path / "run")[: len(lines)] == lines
    assert more["select"]["images"] > first["select"]["images"]


def test_killed_at_any_line_of_the_ledger_it_makes_the_same_choice(line_config, tmp_path):
    """A kill leaves a prefix of the ledger, perhaps half a line, and perhaps the features of a point without its
    line."""
    whole = run(line_config, tmp_path / "run")
    path, text = tmp_path / "run/ledger.jsonl", (tmp_path / "run/ledger.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    for count in (1, 3, len(lines) - 1):
        path.write_text("".join(lines[:count]) + lines[count][:40])
        assert without_times(run(line_config, tmp_path / "run")) == without_times(whole)
        assert [line["key"] for line in ledger(tmp_path / "run")] == [json.loads(line)["key"] for line in lines]


def test_features_that_are_lost_are_made_again_with_the_same_bits(line_config, tmp_path):
    whole = run(line_config, tmp_path / "run")
    files = sorted((tmp_path / "run/features").iterdir())
    before = {file.name: file.read_bytes() for file in files}
    for file in files:
        file.write_bytes(b"half a f")
    assert without_times(run(line_config, tmp_path / "run")["select"]) == without_times(whole["select"])
    searched = {line["key"][:16] for line in ledger(tmp_path / "run") if line["block"]["first_seed"] < 2000}
    assert all((tmp_path / f"run/features/{k}.npz").read_bytes() == before[f"{k}.npz"] for k in searched)


def test_a_grid_of_before_is_known_and_its_keys_stay(line_config, tmp_path):
    """A folder in which the grid ran keeps its lines; the search adds to them."""
    grid = Run(load(line_config, []), tmp_path / "run", World()).all()
    lines = ledger(tmp_path / "run")
    assert grid["select"]["strategy"] == "grid"
    Run(load(line_config, ["select.strategy=search"]), tmp_path / "run", World()).all()
    assert ledger(tmp_path / "run")[: len(lines)] == lines


def test_a_range_that_is_extended_is_said_on_the_terminal(line_config, tmp_path, capsys):
    run(line_config, tmp_path / "run", "select.w=[0.2]", "select.cfg_scale=[1.0]")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "w is now searched in -1 .. 0.8" in line]
    assert line.startswith("  the lowest distance lies at the edge, w = 0.2")


def test_a_budget_below_the_first_points_is_refused_before_any_is_made(line_config, tmp_path):
    with pytest.raises(ValueError, match=r"select.budget_images = 100: the first points take 720 images \(120 each"):
        run(line_config, tmp_path / "run", "select.budget_images=100")
    assert not (tmp_path / "run/ledger.jsonl").exists()


class Slow(Line):
    """Its sampler takes its time: a process can be met at work."""

    name = "slow"

    def sample(self, model: nn.Module, rng: Rng, labels: Tensor | None, how: Sampling) -> tuple[Tensor, Tensor]:
        time.sleep(0.05)
        return super().sample(model, rng, labels, how)


def test_a_search_that_is_killed_at_work_goes_on_to_the_same_bits(line_config, tmp_path):
    """A real process, stopped between two points: a second one is refused while it lives. SIGKILL, then a third makes
    the unbroken search's choice, with its lines and features."""
    line_config.write_text(line_config.read_text().replace("tests.core.line_family:Line", f"{__name__}:Slow"))
    settings = [word for setting in SEARCH for word in ("--set", setting)]
    for name in ("unbroken", "killed"):
        Run(load(line_config, SEARCH), tmp_path / name, World()).finetune()

    def command(name: str) -> list[object]:
        return ["-m", "neon", "search", line_config, "--out", tmp_path / name, "--device", "cpu", *settings]

    unbroken = started(*command("unbroken"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, *map(str, command("killed"))]
    process = subprocess.Popen(call, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = tmp_path / "killed/ledger.jsonl"
    while process.poll() is None and not (lines.is_file() and lines.read_text().count("\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    second = start(*command("killed"))
    assert second.returncode == 1
    assert f"is in use by process {process.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it was at work, not through
    had = ledger(tmp_path / "killed")
    assert 2 <= len(had) < len(ledger(tmp_path / "unbroken"))
    assert without_times(started(*command("killed"))) == without_times(unbroken)
    assert ledger(tmp_path / "killed")[: len(had)] == had
    assert [x["key"] for x in ledger(tmp_path / "killed")] == [x["key"] for x in ledger(tmp_path / "unbroken")]
    features = [{f.name: f.read_bytes() for f in (tmp_path / n / "features").iterdir()} for n in ("unbroken", "killed")]
    assert features[0] == features[1]


def test_the_command_says_what_it_chose_and_why(line_config, tmp_path):
    settings = [word for setting in SEARCH for word in ("--set", setting)]
    started("-m", "neon", "finetune", line_config, "--out", tmp_path / "run", "--device", "cpu", *settings)
    found = started("-m", "neon", "search", line_config, "--out", tmp_path / "run", "--device", "cpu", *settings)
    assert found["chosen"] == found["chosen"] | {"direction": "synth"}
    assert found["ended_by"] in ("gain", "flat", "images", "budget", "edge")
    assert f"{found['images']:,} images" in found["why"]


class Exploding(Line):
    """Its sampler gives NaN where the weights have moved far from the base's."""

    name = "exploding"

    def sample(self, model: nn.Module, rng: Rng, labels: Tensor | None, how: Sampling) -> tuple[Tensor, Tensor]:
        codes, labels = super().sample(model, rng, labels, how)
        start = torch.linspace(-0.5, 0.5, 48).view(3, 1, 4, 4)
        moved = float((model.mean - start).norm())
        return (codes * math.nan if moved > LIMIT else codes), labels


LIMIT = 0.0


def test_images_that_are_no_numbers_are_a_line_of_the_ledger_not_a_stop(line_config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", math.inf)
    line_config.write_text(line_config.read_text().replace("tests.core.line_family:Line", f"{__name__}:Exploding"))
    settings = ("select.w=[-1, 5]", "select.cfg_scale=[1.0]", "report.cfg_scale=1.0")
    runner = Run(load(line_config, (*SEARCH, *settings)), tmp_path / "run", World())
    (shot,) = runner.finetune()[-1:]
    step = checkpoint.read(shot, weights="any").tensors["mean"] - runner.base_tensors["mean"]
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 3 * float(step.norm()))
    found = runner.all()
    failed = [p for p in found["select"]["points"] if "failed" in p]
    assert {p["w"] for p in failed} >= {5.0}
    assert all(p["w"] > 3 for p in failed)
    assert "NaN" in failed[0]["failed"]
    assert abs(found["w"]) < 3
    assert [line for line in ledger(tmp_path / "run") if "failed" in line]


def test_the_merged_file_says_whether_it_is_the_base(line_config, tmp_path):
    """A fine-tune that hardly moves anything: the curve is flat, the base stays, and the file says so."""
    found = run(line_config, tmp_path / "run", "finetune.lr=1e-6")
    meta = checkpoint.read(tmp_path / "run/neon.safetensors").meta
    assert found["w"] == 0
    assert found["verdict"].startswith("no w helped: the curve over w is flat")
    assert meta["is_base"] is True
    assert meta["note"] == found["verdict"]


def test_two_ranks_search_as_one(line_config, tmp_path):
    """Rank 0 keeps the features, both choose by them."""
    settings = [word for setting in SEARCH for word in ("--set", setting)]
    for n in (1, 2):
        started("-m", "neon", "run", line_config, "--out", tmp_path / f"{n}", "--device", "cpu", *settings, ranks=n)
    found = [json.loads((tmp_path / f"{n}/result.json").read_text()) for n in (1, 2)]
    assert found[0]["select"]["chosen"] == found[1]["select"]["chosen"]
    assert found[0]["select"]["ended_by"] == found[1]["select"]["ended_by"]


def test_several_synthetic_sets_share_the_base_and_report_their_spread(line_config, tmp_path):
    settings = [word for setting in SEARCH for word in ("--set", setting)]
    command = ("-m", "neon", "run", line_config, "--out", tmp_path / "run", "--device", "cpu", *settings)
    done = start(*command, "--synth-seeds", 2)
    found = last_object(done.stdout)
    assert done.stderr.splitlines()[-1] == found["verdict"]
    assert found["verdict"].startswith(f"over 2 synthetic sets: {found['metric']} ")
    assert all(verdict in done.stderr for verdict in found["verdicts"])
    results = [json.loads((tmp_path / f"run/synth-seed-{n}/result.json").read_text()) for n in (0, 1)]
    assert found["value"]["values"] == [result["value"] for result in results]
    assert found["value"]["std"] > 0
    assert results[0]["base_value"] == results[1]["base_value"] == found["base_value"]
    assert [r["config"]["synth"]["first_seed"] for r in results] == [0, 50]
    assert results[0]["hashes"]["neon_sha256"] != results[1]["hashes"]["neon_sha256"]
    first, second = (ledger(tmp_path / f"run/synth-seed-{n}") for n in (0, 1))
    base = [line for line in first if line["point"]["synth_sha256"] is None]
    assert second[: len(base)] == base  # with the seconds that they took in the first folder: not computed again
    many = start(*command[:3], line_config, "--out", tmp_path / "many", "--device", "cpu", "--synth-seeds", 30)
    assert many.returncode == 1
    assert "overlap" in many.stderr


def test_many_features_are_searched_on_their_leading_components(line_config, tmp_path, monkeypatch):
    """With 8 of 16 components: measured distances are those of the projected features, the report's are not."""
    monkeypatch.setattr(choose, "MOST_COMPONENTS", 8)
    found = run(line_config, tmp_path / "run")
    assert found["select"]["components"] == 8
    reference = read_reference(tmp_path / "reference.npz")
    basis = torch.linalg.eigh(reference.covariance).eigenvectors[:, -8:]
    point = next(p for p in found["select"]["measured"] if p["w"] != 0)
    own = [
        line
        for line in ledger(tmp_path / "run")
        if line["point"]["w"] == point["w"] and line["block"]["first_seed"] < 2000
    ]
    own = sorted(
        (x for x in own if x["point"]["cfg_scale"] == point["cfg_scale"]), key=lambda x: x["block"]["first_seed"]
    )
    name = "tests.core.line_family:open_pixels"
    rows = torch.cat([torch.from_numpy(np.load(tmp_path / f"run/features/{x['key'][:16]}.npz")[name]) for x in own])

    def distance(features: Tensor) -> float:
        x = features.double() @ basis
        mine = Gaussian(x.mean(0), torch.cov(x.T), len(x))
        real = Gaussian(reference.mean @ basis, basis.T @ reference.covariance @ basis)
        return frechet_distance(generated=mine, reference=real)

    halves = (distance(rows[torch.arange(len(rows)) // 3 % 2 == k]) for k in (0, 1))
    assert point["value"] == pytest.approx(2 * distance(rows) - sum(halves) / 2, rel=1e-3)


def test_the_command_searches_no_other_fine_tune_than_that_of_its_config(line_config, tmp_path):
    """Old snapshots against a new base are no extrapolation of anything."""
    run(line_config, tmp_path / "run")
    base = checkpoint.read(line_config.parent / "base.safetensors")
    other = {name: value * 0.5 if name == "mean" else value for name, value in base.tensors.items()}
    checkpoint.write(tmp_path / "other.safetensors", other, metadata=base.meta)
    settings = [word for override in SEARCH for word in ("--set", override)]

    def said(*more: str) -> str:
        command = ["search", line_config, "--out", tmp_path / "run", "--device", "cpu", *settings, *more]
        result = invoke(main, *command)
        return "" if result.exit_code == 0 else result.output

    assert said() == ""
    assert "begun with another setting: finetune.lr is 0.01" in said("--set", "finetune.lr=0.5")
    assert "begun with another setting: synth.base_sha256 is" in said(
        "--set", f"base.checkpoint={tmp_path / 'other.safetensors'}"
    )
    state = torch.load(tmp_path / "run/finetune/state.pt")
    torch.save(state | {"images_seen": 48}, tmp_path / "run/finetune/state.pt")
    assert "the fine-tune is not finished; `neon finetune` goes on with it" in said()
    (tmp_path / "run/finetune/state.pt").unlink()
    assert said() == ""


def test_points_of_other_snapshots_are_told_apart_along_the_curve(line_config, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4), np.uint8)
    np.savez(tmp_path / "real.npz", images=images)
    more = ("select.snapshots=all", "select.budget_images=4000", f"data.path={tmp_path / 'real.npz'}")
    found = run(line_config, tmp_path / "run", *more)
    chosen = found["select"]["chosen"]["snapshot"]
    measured = [m for m in found["select"]["measured"] if m["w"] != 0 and m["snapshot"] != chosen]
    along = set(found["neighbours"]) - set(found["rows"])
    assert len(along) == len(found["select"]["measured"])
    assert measured
    assert {label for label in along if "images" in label} == {
        f"w = {m['w']:g}, cfg {m['cfg_scale']:g}, after {int(m['snapshot']):,} images" for m in measured
    }


def test_the_cost_of_a_search_is_that_of_every_image_it_made(line_config, tmp_path):
    """Of points that were given more images later, and of other snapshots, too."""
    more = ("select.snapshots=all", "select.budget_images=6000", "select.num_images=360", "select.start_images=60")
    found = run(line_config, tmp_path / "run", *more)
    lines = [line for line in ledger(tmp_path / "run") if 1000 <= line["block"]["first_seed"] < 1360]
    assert {line["block"]["first_seed"] for line in lines} > {1000}
    (cost,) = (cost for cost in found["costs"] if cost["stage"] == "search")
    assert cost["images"] == sum(line["block"]["num_images"] for line in lines)
    assert cost["seconds"] == pytest.approx(sum(line["seconds"]["total"] for line in lines))
    assert found["select"]["images"] == cost["images"]


def test_all_that_was_looked_at_counts_where_a_second_search_is_made(line_config, tmp_path, monkeypatch):
    """On a better snapshot: the images of the first search, and the whole budget."""
    monkeypatch.setattr(choose, "_better_snapshot", lambda found, plan, steps, looked, reference: next(iter(steps)))
    more = ("select.snapshots=all", "select.budget_images=3000", "select.num_images=360", "select.start_images=60")
    found = run(line_config, tmp_path / "run", *more)
    select = found["select"]
    lines = [line for line in ledger(tmp_path / "run") if 1000 <= line["block"]["first_seed"] < 1360]
    assert len({line["point"]["synth_sha256"] for line in lines}) == 3  # two snapshots and the base
    assert select["images"] == sum(line["block"]["num_images"] for line in lines) <= 3000
    assert select["budget_images"] == 3000
    assert f"{select['images']:,} images" in select["why"]


def test_images_that_were_seen_are_not_asked_for_again():
    """Whoever wants a point's first images once more gets these rows; the point keeps the others, and nothing is
    spent."""
    asked = []

    class Scored:
        def score_with_features(self, point, block):
            asked.append((block.first_seed, block.num_images))
            rows = torch.arange(block.first_seed, block.first_seed + block.num_images).float()[:, None]
            return Score(point, {}, {}, f"{block.first_seed}"), {"x": rows}

    looked = choose.Looked(Scored(), Select(w=(1.0,), num_images=20, first_seed=100), "x", "1", None, 0)
    point = Point(w=1.0, snapshot="1")
    for images in (range(8), range(8, 16), range(8), range(6), range(4, 12)):
        found = looked.features(point, images)
        assert found.flatten().tolist() == [100 + i for i in images]
    assert asked == [(100, 8), (108, 8)]
    assert (looked.images_spent, len(looked.all_features[point])) == (16, 16)


def test_image_i_of_the_block_has_class_i_also_where_there_are_more_classes_than_half_the_block(
    line_config, tmp_path, monkeypatch
):
    """What a point is given later goes on with the classes: with 200 prompts the first 60 were asked for again."""
    base = Line().build({"num_classes": 200})
    metadata = {"arch": {"num_classes": 200}, "weights": "ema"}
    checkpoint.write(line_config.parent / "base.safetensors", base.state_dict(), metadata=metadata)
    seen, sample = {}, Line.sample

    def noting(family, model, rng, labels, how):
        seen.update(zip(rng.seeds, labels.tolist(), strict=True))
        return sample(family, model, rng, labels, how)

    monkeypatch.setattr(Line, "sample", noting)
    select = ("select.num_images=390", "select.start_images=60", "select.budget_images=6000", "synth.cfg_scale=1.0")
    run(line_config, tmp_path / "run", *select, "report.num_images=4000", "report.first_seed=20000")
    block = {seed - 1000: label for seed, label in seen.items() if 1000 <= seed < 1390}
    assert max(block) > 60
    assert block == {i: i % 200 for i in block}
