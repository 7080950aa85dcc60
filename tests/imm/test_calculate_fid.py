"""The published command: from a pickle of the original layout to one JSON object, alone and under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fid.frechet import frechet_distance
from fid.moments import Moments
from fid.reference import read_reference
from imm.calculate_fid import main
from imm.family import IMM
from imm.options import Sampling
from imm.presets import MODELS
from neon.checkpoints import checkpoint
from neon.quantize import to_uint8
from neon.seeds import image_rng
from tests.commands import ROOT, FidCommand
from tests.imm import published
from tests.quarters_extractor import Quarters, write_statistics

COMMAND = FidCommand("imm", main, {"--model_ckpt": "model.pkl", "--vae": "vae", "--fid_stats": "stats.npz"})


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, patch):
    """A folder with everything that the command needs, sizes of a test."""
    folder = tmp_path_factory.mktemp("published")
    published.write_checkpoint(patch, folder / "model.pkl", published.TINY_ARCH)
    published.write_vae(folder / "vae", published.TINY_VAE)
    write_statistics(folder / "stats.npz", 16)
    return folder


def test_the_number_is_the_one_of_the_parts(tiny):
    """Sampled, decoded, quantised and measured here by hand: the same Frechet distance."""
    found = COMMAND.here(tiny, "--num_images", 23, "--batch_size", 7, "--img_size", 16, "--steps", 2, "--seed", 5)
    family = IMM()
    model = family.load(checkpoint.read(tiny / "model.pkl")).eval()
    family.open(tiny / "vae", torch.device("cpu"))
    codes, _ = family.sample(
        model, image_rng(5, range(23), "cpu"), torch.arange(23) % 10, Sampling(num_steps=2, cfg_scale=1.8)
    )
    moments = Moments(Quarters.dim)
    moments.update(Quarters()(to_uint8(family.decode(codes), "truncate")).pool)
    expected = frechet_distance(generated=moments.gaussian(), reference=read_reference(tiny / "stats.npz"))
    assert found["value"] == pytest.approx(expected, rel=1e-3)
    assert found["metric"] == "fd23[quarters]"
    assert (found["sampling"]["options"]["cfg_scale"], found["comparable"]) == (1.8, False)


def test_ranks_and_batches_do_not_change_the_number(tiny):
    options = ("--num_images", 23, "--img_size", 16, "--steps", 2)
    alone = COMMAND.here(tiny, *options, "--batch_size", 64)
    together = COMMAND.outside(tiny, *options, "--batch_size", 4, ranks=2)
    assert together["ranks"] == 2
    assert together["value"] == pytest.approx(alone["value"], rel=1e-3)
    other = COMMAND.here(tiny, *options, "--seed", 1, "--protocol", "base")
    assert other["sampling"]["options"]["cfg_scale"] == 1.5
    assert abs(other["value"] - alone["value"]) > 1e-2 * alone["value"]


def test_repeats_are_disjoint_blocks_of_seeds(tiny):
    options = ("--num_images", 5, "--img_size", 16, "--steps", 1)
    found = COMMAND.here(tiny, *options, "--seed", 3, "--repeats", 2)
    values = [COMMAND.here(tiny, *options, "--seed", seed)["value"] for seed in (3, 8)]
    assert found["repeats"]["values"] == values
    assert values[0] != values[1]
    assert found["value"] == min(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model_ckpt", "absent.pkl"), "--model_ckpt: there is no absent.pkl"),
        (("--fid_stats", "absent.npz"), "--fid_stats: there is no absent.npz"),
        (("--vae", "absent"), "--vae: there is no absent"),
        (("--img_size", 512), "makes images of 16 x 16"),
        (("--extractor", "inception-2015-12-05", "--inception", "absent.pkl"), "absent.pkl"),
    ],
)
def test_what_is_missing_is_named_in_one_line(tiny, options, message):
    done = COMMAND.invoke(tiny, "--img_size", 16, *options)
    assert done.exit_code == 1
    assert message in done.stderr
    assert isinstance(done.exception, SystemExit)  # a message, not a traceback


LOAD = """
from imm.family import IMM
from neon.checkpoints import checkpoint
from tests import memory

before = memory.begin_peak()
model = IMM().load(checkpoint.read("model.pkl"))
peak = memory.peak() - before
print(1024 * peak / sum(p.numel() * p.element_size() for p in model.parameters()))
print(sum(float(p.double().sum()) for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory is measured through /proc (Linux)"
)
def test_the_real_size_loads_in_little_more_than_its_own_memory_and_makes_images(tmp_path, patch):
    """DiT-XL/2 (676,735,504 parameters) from a pickle of the true layout, the real VAE, the command as printed but for
    the count."""
    arch = {key: value for key, value in MODELS["Neon_imm_imagenet256"].items() if key != "class_name"}
    model = published.write_checkpoint(patch, tmp_path / "model.pkl", arch)
    checksum = sum(float(parameter.double().sum()) for parameter in model.parameters())
    del model
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ratio, loaded = map(float, done.stdout.split())
    print(f"peak memory while loading: {ratio:.3f} x the parameters' bytes")
    assert ratio <= 1.5
    assert loaded == pytest.approx(checksum, abs=1e-3)
    published.write_vae(tmp_path / "vae", published.SD_VAE)
    write_statistics(tmp_path / "stats.npz", 256)
    options = ("--num_images", 2, "--batch_size", 1, "--img_size", 256, "--steps", 1)
    alone = COMMAND.outside(tmp_path, *options, ranks=1)
    assert alone["value"] > 0
    assert COMMAND.outside(tmp_path, *options, ranks=2)["value"] == pytest.approx(alone["value"], rel=1e-3)
