"""The alignment of real and synthetic gradients against closed forms, on the toy, and as a command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from neon import reverse_merge
from neon.checkpoints import checkpoint
from neon.pipeline.diagnose import diagnose
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.quantize import from_uint8, to_uint8
from neon.report.result import Verdict, diagnosis_against_search
from neon.runtime.distributed import World
from neon.store import records
from neon.toy.autoregressive import Autoregressive
from neon.toy.diffusion import Diffusion
from neon.toy.experiment import Model, evaluation_noise, score, self_train, train_base
from neon.toy.gradients import gradient
from neon.toy.stack import Weights
from neon.toy.target import real_points
from neon.training.alignment import Alignment, Gradients, align, num_gradients
from neon.training.loop import snapshots
from tests.commands import start, started
from tests.core.line_family import Line

CURVATURE = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def quadratic(minimum: Tensor, seed: int, noise: float = 1.0) -> Gradients:
    """Batch gradients of (x - minimum)' diag(CURVATURE) (x - minimum) / 2 at x = 0, each with noise of its own."""

    def at(k: int, offset: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        x = torch.zeros(3, dtype=torch.float64) if offset is None else offset["x"]
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(1000 * seed + k), dtype=torch.float64)
        return {"x": CURVATURE * (x - minimum) + noise * drawn}

    return at


def found(synth: Tensor, *, num_batches: int = 64, seed: int = 0, noise: float = 1.0) -> Alignment:
    real = quadratic(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64), 2 * seed, noise)
    drawn = quadratic(synth.double(), 2 * seed + 1, noise)
    return align(real, drawn, num_batches, alpha=lambda direction: 0.5)


def test_without_noise_it_is_the_closed_form():
    """P is 1 / |r_syn| then, so d = P r_syn = sign(r_syn); s = r_data . d, z = d' H d, w* = -s / (alpha z)."""
    it = found(torch.tensor([-1.0, 2.0, -0.5]), noise=0.0)
    assert it.s == pytest.approx(float((-CURVATURE) @ torch.tensor([1.0, -1.0, 1.0]).double()), rel=1e-6)  # -1 + 2 - 4
    assert it.low == pytest.approx(it.s)
    assert it.curvature == pytest.approx(7.0, rel=1e-6)
    assert it.best_w == pytest.approx(-it.s / (0.5 * 7.0), rel=1e-6)


@pytest.mark.parametrize(("curvature", "is_near"), [(0.0, False), (19.0, False), (21.0, True)])
def test_a_loss_that_is_least_at_the_base_is_said_not_to_decide(curvature, is_near):
    """The small EDM: w < 0 by the interval, best w -0.011 by the loss, 1.2 to 1.7 by the distance."""
    it = Alignment(s=1.0, low=0.5, high=1.5, cosine=0.2, curvature=curvature, alpha=0.5)
    assert it.sentence().startswith("w < 0 should help")
    assert ("search both signs" in it.sentence()) == is_near


@pytest.mark.parametrize("num_batches", [4, 9])
def test_the_progress_ends_at_100_percent(num_batches):
    asked = []

    def counted(gradients: Gradients) -> Gradients:
        return lambda k, offset: (asked.append(k), gradients(k, offset))[1]

    zero = torch.zeros(3, dtype=torch.float64)
    align(counted(quadratic(zero, 2)), counted(quadratic(zero, 1)), num_batches, alpha=lambda direction: 1.0)
    assert len(asked) == num_gradients(num_batches)


@pytest.mark.parametrize(("synth", "sign"), [((-1.0, -1.0, -1.0), 1), ((1.0, 1.0, 1.0), -1)])
def test_the_sign_is_that_of_the_w_that_helps(synth, sign):
    """S's minimum on the other side than the data's: moving away from S helps. On the same side: moving towards it."""
    it = found(torch.tensor(synth))
    assert it.sign == sign
    assert (it.best_w or 0) * sign > 0
    assert it.sentence().startswith(f"w {'>' if sign > 0 else '<'} 0 should help")


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Around 95 % of 200 repetitions; P differs a little between them, so the truth is that of a large sample."""
    synth = torch.tensor([-0.3, 0.2, -0.1])
    truth = found(synth, num_batches=20_000, seed=999).s
    inside = sum(it.low <= truth <= it.high for it in (found(synth, seed=seed) for seed in range(1, 201)))
    assert 0.88 <= inside / 200 <= 1.0


def test_gradients_of_pure_noise_are_undecided():
    zero = quadratic(torch.zeros(3, dtype=torch.float64), 1)
    it = align(quadratic(torch.zeros(3, dtype=torch.float64), 2), zero, 16, alpha=lambda direction: 1.0)
    assert it.low < it.high
    assert it.sentence().startswith(("undecided", "w "))


@pytest.mark.parametrize(("tau", "sign"), [(0.5, 1), (1.6, -1)])
def test_the_toy_says_the_sign_of_w(tau, sign):
    """An autoregressive model of 100 points: S drawn too sharply asks for w > 0, too broadly for w < 0."""
    model = Autoregressive()
    base = train_base(model, real_points(1, 100, seed=0), steps=600, lr=1e-3, seed=1)
    real = real_points(1, 8_000, seed=7)
    noise = torch.randn(1, 8_000, 2, generator=torch.Generator().manual_seed(5))
    synth = model.sample(base, noise, tau)

    assert toy_alignment(model, base, real, synth).sign == sign


def toy_alignment(model: Model, base: Weights, real: Tensor, synth: Tensor) -> Alignment:
    """From 32 batches of each, with draws of their own."""

    def of(points: Tensor, first_seed: int) -> Gradients:
        batches = points.chunk(32, dim=1)

        def at(k: int, offset: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
            weights = base if offset is None else {name: base[name] + offset[name] for name in base}
            return gradient(model, weights, batches[k], seed=first_seed + k)

        return at

    return align(of(real, 0), of(synth, 1_000), 32, alpha=lambda direction: 1e-3)


@pytest.fixture(scope="module")
def diffusion() -> dict[float, Weights]:
    """Two models: points too near to each other, and too far; learned from shrunken and from stretched ones."""
    return {
        scale: train_base(Diffusion(), scale * real_points(1, 4_000, seed=0), steps=600, lr=2e-3, seed=1)
        for scale in (0.8, 1.25)
    }


@pytest.mark.parametrize(("scale", "zeta", "sign"), [(0.8, 1.1, 1), (0.8, 0.8, -1), (1.25, 1.1, -1), (1.25, 0.9, 1)])
def test_the_diffusion_toy_says_the_sign_of_w_and_the_distance_agrees(diffusion, scale, zeta, sign):
    """A mode-seeking sampler (zeta > 1) makes S narrower: w > 0 for a model that is too narrow, w < 0 for one that is
    too broad; a diversity-seeking one the other way. A small step of that sign lowers the distance, one of the other
    sign raises it."""
    model, base = Diffusion(), diffusion[scale]
    noise = torch.randn(1, 8_000, 2, generator=torch.Generator().manual_seed(5))
    found = toy_alignment(model, base, real_points(1, 8_000, seed=7), model.sample(base, noise, zeta))
    assert found.sign == sign
    tuned = self_train(model, base, [zeta], num_synthetic=2_000, budgets=[50], lr=2e-6, seed=3)[50][zeta]
    steps = [reverse_merge(base, tuned, w * sign) for w in (-0.25, 0.0, 0.25)]
    other, here, this = (float(score(model, weights, evaluation_noise(4_000, seed=11))) for weights in steps)
    assert this < here < other


def test_the_command_says_a_sentence_and_needs_real_images(line_config, tmp_path):
    run = ("-m", "neon", "diagnose", line_config, "--out", tmp_path / "run", "--device", "cpu")
    refused = start(*run)
    assert refused.returncode == 1
    assert "[data]" in refused.stderr
    started("-m", "neon", "synth", line_config, "--out", tmp_path / "real", "--device", "cpu",
            "--set", "synth.num_images=200", "--set", "synth.first_seed=5000")  # fmt: skip
    real = ("--set", f'data.path="{tmp_path / "real/synth"}"', "--set", "finetune.batch=10")
    found = started(*run, *real, "--num-images", 45)
    assert found["sign_of_w"] in (-1, 0, 1)
    assert found["low"] <= found["s"] <= found["high"]
    assert found["sentence"].startswith(("undecided", "w "))
    assert found["real_images"].startswith("40 images of ")  # whole batches
    assert json.loads((tmp_path / "run/diagnose.json").read_text())["s"] == found["s"]


def test_the_sign_is_that_of_the_fine_tune_with_its_dropout(line_config, tmp_path):
    """Means m; S lies at 1.3 m, real images at 1.2 m. Without dropout the fine-tune would lead there, w < 0 would help;
    a dropout of one half adds |m|^2 to the loss, and the fine-tune leads to 0.65 m: w > 0 helps, as the fine-tune
    itself shows."""
    base, labels = checkpoint.read(tmp_path / "base.safetensors").tensors["mean"], torch.arange(400) % 3
    noise = torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images = to_uint8(1.2 * base[labels] + 0.1 * noise, "round")
    np.savez(tmp_path / "real.npz", images=images[:, 0].numpy(), labels=labels.numpy())
    config = load(line_config, [
        f'data.path="{tmp_path}/real.npz"', "finetune.arch.dropout=0.5", "synth.cfg_scale=1.3", "synth.num_images=400",
        "sampling.spread=0.1", "finetune.lr=1e-3",
    ])  # fmt: skip
    run, state = Run(config, tmp_path / "run", World()), torch.get_rng_state()
    found = diagnose(run, 400)
    assert torch.equal(torch.get_rng_state(), state)
    assert diagnose(run, 400) == found, "the same masks"

    run.finetune()
    tuned = checkpoint.read(snapshots(tmp_path / "run/finetune")[-1], weights="any").tensors["mean"]

    def loss(w: float) -> Tensor:
        return (reverse_merge({"mean": base}, {"mean": tuned}, w)["mean"][labels] - from_uint8(images)).square().mean()

    assert loss(-0.5) > loss(0.0) > loss(0.5)
    assert found["sign_of_w"] == diagnose(run, 400)["sign_of_w"] == 1


class Coded(Line):
    """Trains on codes of its images."""

    def encode(self, images: Tensor) -> Tensor:
        return images.float()


def test_it_can_be_asked_again_with_more_images_or_others(line_config, tmp_path):
    """Families with an autoencoder refused the second question: their codes of the first lay in the folder."""
    images = np.random.default_rng(0).integers(0, 256, (200, 4, 4), dtype=np.uint8)
    for name, part in (("first", images), ("second", images[:100])):
        np.savez(tmp_path / f"{name}.npz", images=part, labels=np.arange(len(part)) % 3)
    found = []
    for name, num_images in (("first", 40), ("first", 50), ("second", 50), ("first", 40)):
        overrides = [f'data.path="{tmp_path / name}.npz"', "finetune.batch=10", 'synth.store="images"']
        config = load(line_config, overrides)
        found.append(diagnose(Run(config, tmp_path / "run", World(), family=Coded()), num_images)["s"])
    assert found[0] == found[3]
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("sign", "w", "kind", "words"),
    [
        (1, 1.3, "helps", "w = 1.3: the diagnosis was right"),
        (1, -0.4, "edge", "w = -0.4: the diagnosis was wrong about the sign; it speaks of the loss, the choice of fd"),
        (-1, -0.4, "helps", "right"),
        (0, 1.3, "helps", "The choice is w = 1.3."),
        (1, 1.3, "noise", "nothing to compare"),
        (1, 0.0, "base", "nothing to compare"),
    ],
)
def test_the_page_compares_the_diagnosis_with_the_choice(sign, w, kind, words):
    result = SimpleNamespace(
        metric="fd", choice=SimpleNamespace(point=SimpleNamespace(w=w)), verdict=Verdict(kind, "verdict")
    )
    text = diagnosis_against_search({"sign_of_w": sign, "sentence": "s is so and so"}, result)
    assert "s is so and so" in text
    assert words in text
    assert ("right" in text) + ("wrong" in text) == (kind in ("helps", "edge") and sign != 0)


def test_a_diagnosis_that_lies_in_the_folder_is_on_the_page(line_config, tmp_path, caplog):
    folder = tmp_path / "run"
    Run(load(line_config, []), folder, World()).all()
    assert "neon diagnose said" not in (folder / "report.html").read_text()
    records.write_json(records.sealed({"sentence": "s & c", "sign_of_w": 1}), folder / "diagnose.json")
    found = Run(load(line_config, []), folder, World()).all()
    assert found["diagnosis"].startswith("neon diagnose said: s & c.")
    assert "neon diagnose said: s &amp; c." in (folder / "report.html").read_text()
    (folder / "diagnose.json").write_text((folder / "diagnose.json").read_text().replace("1", "-1"))
    assert Run(load(line_config, []), folder, World()).all()["diagnosis"] is None
    assert "diagnose.json: damaged" in caplog.text
