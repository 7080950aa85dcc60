"""A family of one's own that returns something else than the contract says is stopped at the first batch, by name."""

import re
from dataclasses import dataclass

import pytest
import torch

from neon import first_batch
from neon.checkpoints import checkpoint
from neon.cli.main import main
from neon.pipeline.check import check_first_images
from neon.pipeline.experiment import load
from tests.commands import invoke
from tests.core.line_family import Line

SAMPLE, LOSS, DRAW, DECODE = Line.sample, Line.loss, Line.draw, Line.decode


@dataclass(frozen=True)
class Mistake:
    method: str
    does: object
    said: str


MISTAKES = {
    "no tuple": Mistake(
        "sample", lambda *a: SAMPLE(*a)[0], r"line\.sample must return \(codes, labels\).*it returned a tensor \(4, 1"
    ),
    "labels as floats": Mistake(
        "sample", lambda *a: (SAMPLE(*a)[0], SAMPLE(*a)[1].float()), r"the labels are a tensor \(4,\) of float32"
    ),
    "one image too few": Mistake(
        "sample", lambda *a: (SAMPLE(*a)[0][1:], None), r"the codes are a tensor \(3, 1, 4, 4\)"
    ),
    "labels that are kept back": Mistake(
        "sample", lambda *a: (SAMPLE(*a)[0], None), r"num_classes is 3, so it must return the labels that it used"
    ),
    "bytes": Mistake(
        "decode",
        lambda self, codes: ((codes + 1) * 127.5).to(torch.uint8),
        r"line\.decode must return float images \(4, C, H, W\) in \[-1, 1\].* of uint8\. Bytes become",
    ),
    "no channels": Mistake("decode", lambda self, codes: codes[:, 0], r"it returned a tensor \(4, 4, 4\) of float32"),
    "a loss without a graph": Mistake("loss", lambda *a: LOSS(*a).detach(), r"Line\.loss does not depend on the model"),
    "mean over the batch": Mistake(
        "loss",
        lambda *a: LOSS(*a).mean(),
        r"Line\.loss must return the loss of every image, a float tensor \(16,\).*average over all dimensions but the "
        "first",
    ),
    "loss per pixel": Mistake("loss", lambda *a: LOSS(*a)[:, None], r"it returned a tensor \(16, 1\)"),
    "draws of another batch": Mistake(
        "draw", lambda *a: {"noise": torch.zeros(3, 1, 4, 4)}, r"Line\.draw must return .* 'noise' is a tensor \(3, 1"
    ),
    "draws that are a tensor": Mistake("draw", lambda *a: torch.zeros(16), r"must return a dict .* a tensor"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_run_stops_at_the_first_batch_with_what_to_return(line_config, tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(Line, mistake.method, mistake.does)
    done = invoke(main, "run", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), "one line, no traceback"
    assert re.search(mistake.said, done.stderr), done.stderr
    assert not list((tmp_path / "run").glob("finetune/snapshot-*"))


def test_the_unit_interval_is_told_from_the_right_one():
    images = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert first_batch.lies_in_unit_interval(images)
    assert not first_batch.lies_in_unit_interval(images * 2 - 1)
    assert not first_batch.lies_in_unit_interval(torch.full((8, 3, 4, 4), 0.5)), "one grey says nothing"


def run_with(line_config, tmp_path, monkeypatch, sample):
    monkeypatch.setattr(Line, "sample", sample)
    return invoke(main, "run", line_config, "--out", tmp_path / "run", "--device", "cpu")


def test_a_run_refuses_global_noise_and_batch_statistics(line_config, tmp_path, monkeypatch):
    def noisy(self, model, rng, labels, how):
        codes, used = SAMPLE(self, model, rng, labels, how)
        return codes + 0.01 * torch.randn(codes.shape), used

    done = run_with(line_config, tmp_path, monkeypatch, noisy)
    assert done.exit_code == 1
    assert "same seed, same image: line.sample gave other images for the same seeds" in done.stderr

    def centred(self, model, rng, labels, how):
        codes, used = SAMPLE(self, model, rng, labels, how)
        return codes - codes.mean(0), used

    done = run_with(line_config, tmp_path, monkeypatch, centred)
    assert done.exit_code == 1
    assert "batch independence: an image depends on the others" in done.stderr


def test_a_run_warns_of_the_unit_interval(line_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Line, "decode", lambda self, codes: codes.sigmoid())
    done = invoke(main, "synth", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "warning: all values lie in [0." in done.stderr


def test_the_first_images_change_nothing_that_follows(line_config, tmp_path):
    """The global generator's state, from which dropout masks come, is the same before and after."""
    config = load(line_config)
    family = config.family()
    model = family.load(checkpoint.read(tmp_path / "base.safetensors"))
    state = torch.get_rng_state()
    check_first_images(config, family, model, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
