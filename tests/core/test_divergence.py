"""A training that diverges stops by name and publishes nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from neon.pipeline.experiment import load
from neon.pipeline.judging import Judge
from neon.pipeline.publish import publish
from neon.pipeline.repeat import overrides_of, repeated
from neon.pipeline.train_base import train_base
from neon.runtime.distributed import World
from tests.core.line_family import Line

FAMILY = "tests.core.test_divergence"


class InfiniteGradients(torch.autograd.Function):
    """The loss stays as it is, every gradient is infinite."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


class Exploding(Line):
    def loss(self, model, codes, labels, draws, how):
        return InfiniteGradients.apply(super().loss(model, codes, labels, draws, how))


class Huge(Line):
    """Weights near the largest float and a loss that does not ask them: only the weight decay moves them."""

    def build(self, arch):
        model = super().build(arch)
        with torch.no_grad():
            model.mean.fill_(1e30)
        return model

    def loss(self, model, codes, labels, draws, how):
        return (0 * model.mean[labels]).sum((1, 2, 3)) + 1


def config(line_config: Path, tmp_path: Path, family: str) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4), np.uint8)
    np.savez(tmp_path / "real.npz", images=images, labels=np.arange(40) % 3)
    text = line_config.read_text().replace("tests.core.line_family:Line", f"{FAMILY}:{family}")
    real = '[model]\nnum_classes = 3\n[data]\npath = "{}"\npad = 0\n'.format(tmp_path / "real.npz")
    line_config.write_text(text + real + "[train]\nimages = 16\nbatch = 16\nlr = 1e6\n")
    return line_config


@pytest.mark.parametrize("extra", [[], ["train.max_grad_norm=1.0"]])
def test_infinite_gradients_of_the_last_update_write_no_snapshot(line_config, tmp_path, extra):
    path = config(line_config, tmp_path, "Exploding")
    with pytest.raises(FloatingPointError, match=r"gradient norm (inf|nan)"):
        train_base(load(path, extra), tmp_path / "base", World())
    assert not list((tmp_path / "base").rglob("*.safetensors"))


def test_weights_that_overflow_in_the_last_update_write_no_snapshot(line_config, tmp_path):
    path = config(line_config, tmp_path, "Huge")
    overflow = ["train.optimizer=adamw", "train.weight_decay=1e6"]  # weights times 1 - 1e6 * 1e6
    with pytest.raises(FloatingPointError, match="mean holds NaN or infinities after step 1"):
        train_base(load(path, overflow), tmp_path / "base", World())
    assert not list((tmp_path / "base").rglob("*.safetensors"))


@pytest.mark.parametrize("lost", [{"synth-seed-1"}, {"synth-seed-0", "synth-seed-1"}])
def test_reports_whose_images_are_no_numbers(line_config, tmp_path, monkeypatch, lost):
    """Several synthetic sets say how many; of one there is nothing to publish."""
    report = Judge.report

    def without_numbers(judge, choice):
        rows, features = report(judge, choice)
        if judge.folder.name in lost:
            rows["neon"] = replace(rows["neon"], metrics={}, failed="the images hold NaN")
        return rows, features

    monkeypatch.setattr(Judge, "report", without_numbers)
    experiment = load(line_config)
    found = repeated(lambda n: load(line_config, overrides_of(experiment, n)), 2, tmp_path / "sets", World())
    if len(lost) == 2:
        assert found["value"] is None
        assert found["verdict"] == "no verdict: the images of neon are no numbers"
    else:
        alone = json.loads((tmp_path / "sets/synth-seed-0/result.json").read_text())
        assert found["value"]["values"] == [alone["value"]]
        assert found["verdict"].startswith(f"over 1 synthetic sets: {alone['metric']} {alone['base_value']:.4g} -> ")
        assert found["verdict"].endswith("(mean and spread); 1 gave images that are no numbers")
    with pytest.raises(ValueError, match=r"there are no numbers to publish; no verdict: the images of neon"):
        publish(tmp_path / "sets/synth-seed-1", tmp_path / "out")
