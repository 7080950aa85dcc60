"""The whole of Neon on the smallest family: fixed points, resumption after kills at any file, refusals."""

import html
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from neon.checkpoints import checkpoint
from neon.cli.main import main
from neon.images import formats, torchvision_sets
from neon.images.formats import from_array, open_images
from neon.pipeline import judging
from neon.pipeline.evaluate_base import evaluate_base
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.runtime.distributed import World
from tests.commands import ROOT, invoke, started
from tests.core.line_family import Line
from tests.core.test_files import no_file_longer_than


def run(config: Path, folder: Path, *overrides: str) -> dict:
    return Run(load(config, overrides), folder, World()).all()


def without_times(value):
    """A result without what legitimately differs between two runs."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "merged")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def test_a_run_ends_with_numbers_a_merged_file_and_a_page(line_config, tmp_path):
    result = run(line_config, tmp_path / "run")
    rows, points = result["rows"], result["select"]["points"]
    assert set(rows) == {"base", "self-trained", "random direction", "neon"}
    assert {p["w"] for p in points if p["direction"] == "synth"} == {-1.0, 0.0, 0.5, 1.0}
    assert [p["direction"] for p in points].count("random") == 1
    metric = result["select"]["metric"]
    tried = {
        (p["w"], p["cfg_scale"], p["snapshot"]): p["metrics"][metric]
        for p in points
        if p["direction"] == "synth" and p["w"] >= 0
    }
    assert min(tried, key=tried.get)[:2] == (result["w"], result["cfg_scale"])
    page = (tmp_path / "run/report.html").read_text()
    assert "tests.core.line_family:Line" in page
    assert html.escape(result["verdict"]) in page
    assert json.loads((tmp_path / "run/result.json").read_text())["value"] == rows["neon"]["metrics"][result["metric"]]

    base, merged = checkpoint.read(tmp_path / "base.safetensors"), checkpoint.read(tmp_path / "run/neon.safetensors")
    shot = checkpoint.read(
        tmp_path / f"run/finetune/snapshot-{result['snapshot_images']:012d}.safetensors", weights="any"
    )
    expected = base.tensors["mean"] - result["w"] * (shot.tensors["mean"] - base.tensors["mean"])
    torch.testing.assert_close(merged.tensors["mean"], expected, atol=1e-6, rtol=0)
    assert torch.equal(merged.tensors["mask"], base.tensors["mask"])  # -inf stays -inf


def test_network_calls_are_those_of_every_image_at_its_own_guidance(line_config, tmp_path, monkeypatch):
    """A network that is called 1,000 times the guidance: all images counted at the chosen one would be another sum."""
    monkeypatch.setattr(
        "neon.pipeline.run.calls_per_image", lambda source, model, device: round(1000 * source.options.cfg_scale)
    )
    result = run(line_config, tmp_path / "run")
    costs = {cost["stage"]: cost["network_calls"] for cost in result["costs"]}
    config = load(line_config)
    lines = [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    searched = [line for line in lines if line["block"]["first_seed"] == config.select.first_seed]
    assert len({line["point"]["cfg_scale"] for line in searched}) > 1
    assert costs["search"] == sum(
        round(1000 * line["point"]["cfg_scale"]) * line["block"]["num_images"] for line in searched
    )
    assert costs["report"] == sum(
        round(1000 * row["cfg_scale"]) * config.report.num_images for row in result["rows"].values()
    )
    scale = config.synth.cfg_scale
    assert costs["synthetic set"] == (1000 if scale is None else round(1000 * scale)) * config.synth.num_images


def test_w_0_is_the_base_and_its_own_evaluation(line_config, tmp_path):
    """`neon eval` of the base file gives, bit for bit, what the grid's w = 0 row says."""
    result = run(line_config, tmp_path / "run")
    cfg = result["rows"]["base"]["cfg_scale"]
    alone = evaluate_base(Run(load(line_config, [f"report.cfg_scale={cfg}"]), tmp_path / "eval", World()), 1)
    assert alone["value"] == result["base_value"]
    merged = load(
        line_config, [f"base.checkpoint={tmp_path / 'run/neon.safetensors'}", f"report.cfg_scale={result['cfg_scale']}"]
    )
    assert evaluate_base(Run(merged, tmp_path / "eval2", World()), 1)["value"] == result["value"]


def test_eval_repeats_are_disjoint_blocks(line_config, tmp_path):
    config = load(line_config, ["report.cfg_scale=1.0"])
    several = evaluate_base(Run(config, tmp_path / "a", World()), 2)["repeats"]["values"]
    shifted = load(line_config, ["report.cfg_scale=1.0", "report.first_seed=2040"])
    assert several[1] == evaluate_base(Run(shifted, tmp_path / "b", World()), 1)["value"]
    assert several[0] != several[1]


def test_eval_repeats_keep_away_from_the_seeds_that_chose(line_config, tmp_path):
    config = load(line_config, ["report.cfg_scale=1.0", "report.first_seed=900"])
    evaluate_base(Run(config, tmp_path / "a", World()), 2)
    with pytest.raises(
        ValueError, match=r"the seeds of select \(1000 \.\. 1029\) and report \(900 \.\. 1019\) overlap"
    ):
        evaluate_base(Run(config, tmp_path / "a", World()), 3)


def test_eval_of_another_file_by_the_command(line_config, tmp_path):
    base = checkpoint.read(tmp_path / "base.safetensors")
    other = {name: value * 0.9 if name == "mean" else value for name, value in base.tensors.items()}
    metadata = {"family": "tests.core.line_family:Line", "arch": {}, "weights": "raw"}
    checkpoint.write(tmp_path / "other.safetensors", other, metadata=metadata)
    options = ("--set", "report.cfg_scale=1.0", "--device", "cpu", "--out", tmp_path / "eval")
    named = ("--checkpoint", tmp_path / "other.safetensors", "--weights", "raw", "--repeats", 2)
    found = started("-m", "neon", "eval", line_config, *named, *options)
    settings = ["report.cfg_scale=1.0", f"base.checkpoint={tmp_path / 'other.safetensors'}", "base.weights=raw"]
    expected = evaluate_base(Run(load(line_config, settings), tmp_path / "by-hand", World()), 2)
    assert found["repeats"]["values"] == expected["repeats"]["values"]
    assert (
        found["value"]
        != evaluate_base(Run(load(line_config, ["report.cfg_scale=1.0"]), tmp_path / "base", World()), 1)["value"]
    )


def test_a_finished_run_repeats_nothing(line_config, tmp_path):
    first = run(line_config, tmp_path / "run")
    ledger = (tmp_path / "run/ledger.jsonl").read_text()
    again = run(line_config, tmp_path / "run")
    assert (tmp_path / "run/ledger.jsonl").read_text() == ledger
    assert without_times(again) == without_times(first)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("synth.first_seed=5", "first_seed"),
        ("finetune.lr=0.02", r"finetune\.lr is 0\.01"),
        ("sampling.spread=0.3", r"sampling\.spread is"),
        ("finetune.images=192", r"finetune\.images"),
    ],
)
def test_a_config_changed_under_a_half_done_run_is_refused_by_key(line_config, tmp_path, override, key):
    run(line_config, tmp_path / "run")
    merged = (tmp_path / "run/neon.safetensors").read_bytes()
    with pytest.raises(ValueError, match=f"begun with another setting: {key}"):
        run(line_config, tmp_path / "run", override)
    assert (tmp_path / "run/neon.safetensors").read_bytes() == merged


def test_more_points_in_the_grid_cost_only_themselves(line_config, tmp_path):
    run(line_config, tmp_path / "run")
    before = len((tmp_path / "run/ledger.jsonl").read_text().splitlines())
    run(line_config, tmp_path / "run", "select.w=[0.5, 0.75, 1.0]")
    added = len((tmp_path / "run/ledger.jsonl").read_text().splitlines()) - before
    assert 4 <= added <= 4 + 4  # 0.75 at two guidances and two snapshots; at most another winner with its controls


def test_the_synthetic_set_is_a_training_set(line_config, tmp_path):
    run(line_config, tmp_path / "run")
    images = open_images(tmp_path / "run/synth")
    assert len(images) == 50
    assert images.labels.tolist() == [i % 3 for i in range(50)]
    assert images.read([49]).shape == (1, 1, 4, 4)


def start(config: Path, folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "neon", "run", str(config), "--out", str(folder), "--device", "cpu"]
    command += [word for override in overrides for word in ("--set", override)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=hears_interrupts,
    )


def hears_interrupts() -> None:
    """A shell that starts the tests in its background makes them deaf to Ctrl-C, and so all that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def count_files(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))  # os.walk does not mind that folders vanish under it


def test_killed_at_random_moments_it_ends_with_the_same_bits(line_config, tmp_path):
    """Kills are aimed by the number of files that exist, so that they fall into every stage."""
    unbroken = run(line_config, tmp_path / "unbroken")
    folder = tmp_path / "killed"
    total = count_files(tmp_path / "unbroken")
    for target in sorted(random.Random(0).sample(range(2, total - 1), 5)):
        process = start(line_config, folder)
        while process.poll() is None and count_files(folder) < target:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start(line_config, folder)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads(out.splitlines()[-1])["value"] == unbroken["value"]
    kept = json.loads((folder / "result.json").read_text())
    assert without_times(kept) == without_times(json.loads(json.dumps(unbroken)))
    assert (folder / "neon.safetensors").read_bytes() == (tmp_path / "unbroken/neon.safetensors").read_bytes()


def test_the_command_ends_with_a_summary_and_the_verdict_is_said_last(line_config, tmp_path):
    """Both streams in one, as a terminal shows them. Everything else lies in the file that the summary names."""
    command = f"{sys.executable} -m neon run {line_config} --out {tmp_path}/run --device cpu 2>&1"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    *_, line, verdict = done.stdout.splitlines()
    assert len(line) < 2500
    summary = json.loads(line)
    whole = json.loads(Path(summary["result"]).read_text())
    assert verdict == summary["verdict"] == whole["verdict"]
    assert done.stdout.count(verdict) == 2, "in the summary, and said"
    assert summary["rows"] == {
        name: {key: row[key] for key in row if key != "seconds"} for name, row in whole["rows"].items()
    }
    own = {"rows", "result", "page"}
    assert {key: value for key, value in summary.items() if key not in own} == {
        key: whole[key] for key in summary if key not in own
    }
    assert set(summary) >= {"metric", "value", "base_value", "w", "costs", "comparable", "merged"}
    assert Path(summary["page"]).is_file()
    assert Path(summary["merged"]).is_file()
    assert set(whole) - set(summary) == {
        "formula", "select", "neighbours", "config", "hashes", "references", "step", "versions"
    }  # fmt: skip


def test_two_runs_on_one_folder(line_config, tmp_path):
    from neon.store.files import folder_lock

    with folder_lock(tmp_path / "run"):
        process = start(line_config, tmp_path / "run")
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "in use by process" in errors
    assert not (tmp_path / "run/synth").exists()


def test_a_missing_reference_is_said_before_anything_is_made(line_config, tmp_path):
    (tmp_path / "reference.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"reference\.npz"):
        run(line_config, tmp_path / "run")
    assert not (tmp_path / "run/synth").exists()


def test_guidance_has_no_hidden_default(line_config, tmp_path):
    text = line_config.read_text().replace("cfg_scale = 1.0\n[finetune]", "[finetune]")
    line_config.write_text(text)
    with pytest.raises(ValueError, match=r"synth\.cfg_scale.*no hidden default"):
        run(line_config, tmp_path / "run")


def test_a_full_disk_ends_the_run_with_one_line_and_the_next_run_goes_on(line_config, tmp_path):
    """Every file of the run that is longer than 1.5 kB fails, whichever comes first, until there is room again."""
    unbroken = run(line_config, tmp_path / "unbroken")
    with no_file_longer_than(1536):  # in this process: torch 2.5 writes a file of its own when a first run imports it
        done = invoke(main, "run", line_config, "--out", tmp_path / "full", "--device", "cpu")
    assert done.exit_code == 1
    errors = [line for line in done.stderr.splitlines() if "File too large" in line]
    assert len(errors) == 1
    assert re.fullmatch(rf"Error: .*File too large while it was written.*{tmp_path / 'full'}.*", errors[0])
    assert done.stderr.endswith(f"{errors[0]}\n")
    again = run(line_config, tmp_path / "full")
    assert without_times(again) == without_times(unbroken)
    assert (tmp_path / "full/neon.safetensors").read_bytes() == (tmp_path / "unbroken/neon.safetensors").read_bytes()


def test_a_folder_that_cannot_be_made_is_named_before_any_work(line_config, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    process = start(line_config, tmp_path / "file/run")
    out, errors = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert str(tmp_path / "file/run") in errors.splitlines()[-1]


def test_precision_and_recall_see_every_class_of_a_set_that_is_sorted(line_config, tmp_path, monkeypatch):
    """The base makes three classes; of the first images of sorted ones it would seem to miss two thirds."""
    monkeypatch.setattr(judging, "MAX_REAL", 100)
    model, generator = Line().build({}), torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(200)
    real = model.mean.detach()[labels] + 0.2 * torch.randn(600, 1, 4, 4, generator=generator)
    images = ((real + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    np.savez(tmp_path / "sorted.npz", images=images.numpy(), labels=labels.numpy())
    found = run(line_config, tmp_path / "run", f"data.path={tmp_path / 'sorted.npz'}", "report.cfg_scale=1.0")
    base = found["neighbours"]["base"]
    assert base["precision"] > 0.8
    assert base["recall"] > 0.8


def test_a_report_of_two_images_has_no_error_bars(line_config, tmp_path):
    found = run(line_config, tmp_path / "run", "report.num_images=2", "report.num_shown=2")
    assert found["difference"]["error"] is None
    assert all("error" not in row for row in found["rows"].values())


@pytest.mark.parametrize(
    ("shape", "settings"),
    [((60, 8, 8), ()), ((4, 4, 4), ()), ((60, 4, 4), ("report.num_images=5", "report.num_shown=5"))],
    ids=["other size", "few images", "few reported"],
)
def test_data_that_give_no_precision_and_recall_do_not_end_a_run(line_config, tmp_path, caplog, shape, settings):
    np.savez(tmp_path / "real.npz", images=np.full(shape, 7, np.uint8))
    found = run(line_config, tmp_path / "run", f"data.path={tmp_path / 'real.npz'}", *settings)
    assert found["neighbours"] == {}
    assert ("precision and recall are left out: " in caplog.text) == (shape == (60, 8, 8))


def test_data_of_torchvision_give_precision_and_recall(line_config, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4), np.uint8)
    monkeypatch.setattr(formats, "_open", lambda path, *_: pytest.fail(f"{path} was opened as a file"))
    monkeypatch.setattr(torchvision_sets, "open_torchvision", lambda spec: from_array(Path(spec), images))
    found = run(line_config, tmp_path / "run", "data.path=torchvision:MNIST:train:/data")
    assert set(found["neighbours"]) == set(found["rows"])
