"""What a run logs arrives in TensorBoard's files and in Weights & Biases (offline), number by number."""

import json

import pytest
from click.testing import CliRunner

from neon.cli.main import main
from neon.store import records

ARGUMENTS = ("--device", "cpu", "--set", "finetune.images=32")


def logged(config, folder, kind: str) -> None:
    done = CliRunner().invoke(main, ["run", str(config), "--out", str(folder), "--log", kind, *ARGUMENTS])
    assert done.exit_code == 0, done.output


def test_tensorboard_gets_every_loss_and_score(line_config, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged(line_config, tmp_path / "run", "tensorboard")
    found = event_accumulator.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    lines = records.read_lines(tmp_path / "run/finetune/log.jsonl")
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(line["images"], pytest.approx(line["loss"], rel=1e-6)) for line in lines]
    ledger = records.read_lines(tmp_path / "run/ledger.jsonl")
    for metric in {name for line in ledger for name in line["metrics"]}:
        expected = [pytest.approx(line["metrics"][metric], rel=1e-6) for line in ledger if metric in line["metrics"]]
        assert [event.value for event in found.Scalars(f"points/{metric}")] == expected
    w = [event.value for event in found.Scalars("points/w")]
    assert w == [pytest.approx(line["point"]["w"]) for line in ledger]


def test_wandb_offline_gets_the_losses(line_config, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sent: list[dict] = []
    log = wandb.sdk.wandb_run.Run.log

    def noted(self, data, *rest, **options):
        sent.append(dict(data))
        return log(self, data, *rest, **options)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", noted)
    logged(line_config, tmp_path / "run", "wandb")
    lines = records.read_lines(tmp_path / "run/finetune/log.jsonl")
    assert [(d["train/images"], d["train/loss"]) for d in sent if "train/loss" in d] == [
        (line["images"], line["loss"]) for line in lines
    ]
    assert list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))


def test_a_tracker_does_not_change_the_result(line_config, tmp_path):
    logged(line_config, tmp_path / "with", "tensorboard")
    plain = CliRunner().invoke(main, ["run", str(line_config), "--out", str(tmp_path / "without"), *ARGUMENTS])
    assert json.loads(plain.stdout)["value"] == json.loads((tmp_path / "with/result.json").read_text())["value"]
    assert records.LISTENERS == []
