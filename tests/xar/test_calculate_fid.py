"""The published command: from files of the published layout to one JSON object, alone and under torchrun."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from fid.frechet import frechet_distance
from fid.moments import Moments
from fid.reference import read_reference
from neon.checkpoints import checkpoint
from neon.quantize import to_uint8
from neon.seeds import image_rng
from tests.commands import FidCommand
from tests.quarters_extractor import Quarters
from tests.xar import published
from xar import calculate_fid
from xar.family import XAR
from xar.options import Sampling
from xar.presets import SIZES

COMMAND = FidCommand(
    "xar", calculate_fid.main, {"--model_ckpt": "base.pth", "--vae_path": "vae.safetensors", "--fid_stats": "stats.npz"}
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    published.write_tiny(folder)
    return folder


def test_the_number_is_the_one_of_the_parts(tiny):
    """Sampled, decoded, quantised and measured here by hand: the same Frechet distance."""
    found = COMMAND.here(
        tiny, "--num_images", 23, "--batch_size", 7, "--img_size", 32, "--flow_steps", 2, "--cfg", 1.8, "--seed", 5
    )
    family = XAR()
    model = family.load(checkpoint.read(tiny / "base.pth")).eval()
    family.open(tiny / "vae.safetensors", torch.device("cpu"))
    with torch.inference_mode():
        codes, _ = family.sample(
            model, image_rng(5, range(23), "cpu"), torch.arange(23) % 10, Sampling(num_steps=2, cfg_scale=1.8)
        )
        images = to_uint8(family.decode(codes), "truncate")
    moments = Moments(Quarters.dim)
    moments.update(Quarters()(images).pool)
    expected = frechet_distance(generated=moments.gaussian(), reference=read_reference(tiny / "stats.npz"))
    assert found["value"] == pytest.approx(expected, rel=1e-3)
    assert found["metric"] == "fd23[quarters]"
    assert found["comparable"] is False
    assert found["sampling"]["options"] == {"num_steps": 2, "cfg_scale": 1.8, "solver": "sde"}
    assert not list(tiny.glob("temp*"))


def test_ranks_and_batches_do_not_change_the_number(tiny):
    options = ("--num_images", 23, "--flow_steps", 2, "--cfg", 1.5)
    alone = COMMAND.here(tiny, *options, "--batch_size", 64)
    together = COMMAND.outside(tiny, *options, "--batch_size", 4, ranks=2)
    assert together["ranks"] == 2
    assert together["value"] == pytest.approx(alone["value"], rel=1e-3)


def test_the_weights_of_a_fine_tuned_file_are_its_average(tiny):
    found = COMMAND.here(tiny, "--num_images", 4, "--flow_steps", 2, "--cfg", 1.0, "--model_ckpt", tiny / "tuned.pth")
    assert found["checkpoint"]["weights"] == "ema"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cfg", 1.5), "--flow_steps"),
        (("--flow_steps", 2), "--cfg"),
        (("--cfg", 1.5, "--flow_steps", 1), "--flow_steps >= 2"),
        (("--model", "xar_base", "--cfg", 1.5, "--flow_steps", 2), "--model xar_base"),
        (("--model_ckpt", "absent.pth"), "--model_ckpt: there is no absent.pth"),
        (("--vae_path", "absent.ckpt", "--cfg", 1.5, "--flow_steps", 2), "--vae_path: there is no absent.ckpt"),
        (("--fid_stats", "absent.npz", "--cfg", 1.5, "--flow_steps", 2), "absent.npz"),
        (("--img_size", 256, "--cfg", 1.5, "--flow_steps", 2), "makes images of 32 x 32"),
    ],
)
def test_a_mistake_is_one_line(tiny, options, message):
    done = COMMAND.invoke(tiny, "--num_images", 2, *options)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("size", "protocol", "scale", "steps"),
    [
        ("xar_base", "neon", 3.8, 40),
        ("xar_large", "neon", 2.7, 50),
        ("xar_base", "base", 2.7, 40),
        ("xar_large", "base", 2.3, 50),
        ("xar_huge", "base", 2.2, 50),
    ],
)
def test_the_protocols_are_two_things(size, protocol, scale, steps):
    how = calculate_fid.options_of(size, protocol, None, None)
    assert (how.cfg_scale, how.num_steps, how.solver) == (scale, steps, "sde")


def test_nothing_is_published_for_neon_on_xar_huge():
    with pytest.raises(ValueError, match="no neon guidance is published for xar_huge"):
        calculate_fid.options_of("xar_huge", "neon", None, None)


def test_the_help_names_the_published_flags():
    text = CliRunner().invoke(calculate_fid.main, ["--help"]).output
    for flag in (
        "model",
        "model_ckpt",
        "cfg",
        "vae_path",
        "num_images",
        "batch_size",
        "flow_steps",
        "img_size",
        "fid_stats",
        "seed",
        "inception",
    ):
        assert f"--{flag} " in text, flag
    assert isinstance(calculate_fid.main, click.Command)


@pytest.mark.slow
def test_the_published_command_in_real_size(tmp_path):
    """As printed but for the missing weights: few images, few steps, another feature network; plain python and
    torchrun."""
    published.write_real(tmp_path, SIZES["xar_base"])
    files = ("--model", "xar_base", "--model_ckpt", tmp_path / "model.pth", "--vae_path", tmp_path / "kl16.ckpt")
    options = ("--cfg", 3.8, "--num_images", 2, "--batch_size", 32, "--flow_steps", 2, "--img_size", 256)
    alone = COMMAND.outside(tmp_path, *files, *options)
    together = COMMAND.outside(tmp_path, *files, *options, ranks=2)
    assert (alone["ranks"], together["ranks"]) == (1, 2)
    assert alone["num_images"] == together["num_images"] == 2
    assert together["value"] == pytest.approx(alone["value"], rel=1e-3)
