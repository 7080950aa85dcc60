"""The evaluation command: from TorchCFM's file to one JSON object, alone and under torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fid.frechet import frechet_distance
from fid.moments import Moments
from fid.reference import read_reference
from flow.calculate_fid import main
from flow.family import Flow
from flow.options import Sampling
from flow.presets import CIFAR10
from neon.checkpoints import checkpoint
from neon.quantize import to_uint8
from neon.seeds import image_rng
from neon.store import records
from tests.commands import FidCommand
from tests.flow import published
from tests.quarters_extractor import Quarters, write_statistics

COMMAND = FidCommand("flow", main, {"--model_ckpt": "model.pt", "--fid_stats": "stats.npz"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The published network with an eighth of its channels."""
    folder = tmp_path_factory.mktemp("published")
    published.write_checkpoint(folder / "model.pt", {**CIFAR10, "num_channels": 32}, "module.")
    write_statistics(folder / "stats.npz")
    return folder


def test_the_number_is_the_one_of_the_parts(tiny):
    """Sampled, quantised and measured here by hand: the same Frechet distance."""
    options = ("--num_images", 5, "--batch_size", 4, "--img_size", 32, "--seed", 5)
    found = COMMAND.here(tiny, *options, "--integration_method", "euler", "--integration_steps", 2)
    family = Flow()
    model = family.load(checkpoint.read(tiny / "model.pt")).eval()
    with torch.inference_mode():
        codes, _ = family.sample(model, image_rng(5, range(5), "cpu"), None, Sampling(solver="euler", num_steps=2))
    moments = Moments(Quarters.dim)
    moments.update(Quarters()(to_uint8(family.decode(codes), "edm")).pool)
    expected = frechet_distance(generated=moments.gaussian(), reference=read_reference(tiny / "stats.npz"))
    assert found["value"] == pytest.approx(expected, rel=1e-3)
    assert found["metric"] == "fd5[quarters]"
    assert (found["sampling"]["uint8"], found["comparable"], found["checkpoint"]["weights"]) == ("edm", False, "ema")


def test_a_killed_command_goes_on_with_the_same_bits(tiny, tmp_path, monkeypatch):
    """Two blocks of two batches, killed in the second block: one finished block and one batch are found again."""
    monkeypatch.setenv("NEON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(records.Saver, "is_due", property(lambda self: True))
    options = ("--num_images", 4, "--batch_size", 2, "--integration_method", "euler", "--integration_steps", 2)
    sampled: list[int] = []
    sample = Flow.sample

    def counted(self, model, rng, labels, how):
        if len(sampled) == 3:
            raise KeyboardInterrupt
        sampled.append(rng.seeds[0])
        return sample(self, model, rng, labels, how)

    whole = COMMAND.here(tiny, *options, "--repeats", 2)
    assert not list((tmp_path / "cache/passes").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(Flow, "sample", counted)
        killed = COMMAND.invoke(tiny, *options, "--repeats", 2)
        assert killed.exit_code == 130
        assert killed.output.splitlines()[-1] == "stopped. What was made is kept: run the same command to go on"
        assert sampled == [0, 2, 4]
        sampled.clear()
        again = COMMAND.here(tiny, *options, "--repeats", 2)
    assert sampled == [6]
    assert again["metrics"] == whole["metrics"]
    assert again["repeats"] == whole["repeats"]


def test_ranks_and_batches_do_not_change_the_number(tiny):
    """By dopri5 with its own steps for every image."""
    options = ("--num_images", 4, "--tol", 0.1)
    alone = COMMAND.here(tiny, *options, "--batch_size", 4)
    together = COMMAND.outside(tiny, *options, "--batch_size", 2, ranks=2)
    assert together["ranks"] == 2
    assert together["sampling"]["options"] == {"solver": "dopri5", "num_steps": None, "tol": 0.1, "error_norm": "image"}
    assert together["value"] == pytest.approx(alone["value"], rel=2e-4)
    other = COMMAND.here(tiny, *options, "--weights", "raw", "--seed", 1, "--error_norm", "batch")
    assert abs(other["value"] - alone["value"]) > 2e-3 * alone["value"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model_ckpt", "absent.pt"), "--model_ckpt: there is no absent.pt"),
        (("--fid_stats", "absent.npz"), "--fid_stats: there is no absent.npz"),
        (("--img_size", 64), "makes images of 32 x 32"),
        (("--weights", "best"), "holds no 'best' weights"),
        (("--integration_steps", 100), "belongs to --integration_method = 'euler'"),
    ],
)
def test_what_is_missing_is_named_in_one_line(tiny, options, message):
    done = COMMAND.invoke(tiny, *options)
    assert done.exit_code == 1
    assert message in done.stderr
    assert isinstance(done.exception, SystemExit)  # a message, not a traceback


def test_the_defaults_are_the_published_protocol(tiny, monkeypatch):
    """100 steps where it is Euler's method, 50,000 images, the average's weights, TorchCFM's rounding."""
    asked = []
    monkeypatch.setattr("flow.calculate_fid.calculate_fid", asked.append)
    for options in ((), ("--integration_method", "euler")):
        assert COMMAND.invoke(tiny, *options).exit_code == 0
    adaptive, fixed = asked
    assert adaptive.options == Sampling(solver="dopri5", tol=1e-5, error_norm="image")
    assert fixed.options == Sampling(solver="euler", num_steps=100)
    assert (fixed.images.num_images, fixed.common.weights, fixed.uint8) == (50_000, "ema", "edm")


@pytest.mark.slow
def test_the_real_size_makes_images(tmp_path):
    """35,746,307 parameters in TorchCFM's layout, the command as printed but for the count."""
    published.write_checkpoint(tmp_path / "model.pt", CIFAR10)
    write_statistics(tmp_path / "stats.npz")
    alone = COMMAND.outside(tmp_path, "--num_images", 2, "--batch_size", 1024, ranks=1)
    assert alone["value"] > 0
    together = COMMAND.outside(tmp_path, "--num_images", 2, "--batch_size", 1024, ranks=2)
    assert together["value"] == pytest.approx(alone["value"], rel=1e-3)
