"""The whole of Neon on xAR with real images: autoencoder and base trained by our own commands, one and two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fid.features import open_extractor
from fid.moments import Moments
from fid.reference import write_reference
from neon import config
from neon.checkpoint import read
from neon.data import open_images
from neon.distributed import World
from neon.run import Run
from neon.seeds import ImageRng
from neon.train_autoencoder import train_autoencoder
from neon.train_base import train_base
from xar.family import XAR, XARSampling

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
family = "xar"
[data]
path = "{folder}/real.npz"
pad = 2
[autoencoder]
held_out = 16
[autoencoder.arch]
ch = 8
ch_mult = [1, 2]
num_res_blocks = 1
image_channels = 1
num_groups = 4
resolution = 32
encoder_attn_resolutions = []
[autoencoder.train]
images = 192
batch = 16
lr = 5e-3
[model]
width = 32
num_heads = 2
encoder_depth = 1
decoder_depth = 1
num_classes = 10
[train]
images = 64
batch = 16
lr = 1e-3
[base]
checkpoint = "{folder}/base/model.safetensors"
weights = "any"
autoencoder = "{folder}/vae/autoencoder.safetensors"
[sampling]
num_steps = 2
uint8 = "round"
batch = 8
[synth]
num_images = 20
shard_images = 8
cfg_scale = 1.5
store = "{store}"
[finetune]
images = 48
batch = 12
lr = 2e-4
optimizer = "adamw"
weight_decay = 0.02
max_grad_norm = 1.0
ema_decay = 0.5
objective = {{ dropout = 0.0 }}
[select]
num_images = 12
first_seed = 1000
w = [1.0]
cfg_scale = [1.5]
[report]
num_images = 20
first_seed = 2000
cfg_scale = "selected"
extractors = {{ fashion-cnn = "{folder}/reference.npz" }}
"""


def write_config(folder: Path, store: str) -> Path:
    path = folder / f"{store}.toml"
    path.write_text(CONFIG.format(folder=folder, store=store))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Real images, their reference statistics, an autoencoder and a base model trained on them for a few steps."""
    folder = tmp_path_factory.mktemp("xar")
    with np.load(ROOT / "demo" / "fashion_base.npz") as data:
        np.savez(folder / "real.npz", images=data["images"][:96], labels=data["labels"][:96])
    extractor = open_extractor("fashion-cnn")
    moments = Moments(extractor.dim)
    moments.update(extractor(open_images(folder / "real.npz").read(range(96))).pool)
    write_reference(folder / "reference.npz", moments, {"extractor": extractor.name})
    experiment = config.load(write_config(folder, "images"))
    assert train_autoencoder(experiment, folder / "vae", World())["held_out"] == 16
    assert train_base(experiment, folder / "base", World())["steps"] == 4
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    return Run(config.load(write_config(folder, "images")), folder / "alone", World()).all()


def test_end_to_end(folder, alone):
    assert set(alone["rows"]) == {"base", "self-trained", "random direction", "neon"}
    assert alone["metric"] == "fd20[fashion-cnn]"
    assert (folder / "alone/report.html").is_file()
    synth = open_images(folder / "alone/synth")
    assert synth.shape == (1, 32, 32)
    assert synth.labels.tolist() == [i % 10 for i in range(20)]


def test_the_merged_file_is_the_formula_and_samples(folder, alone):
    family, merged = XAR(), read(folder / "alone/neon.safetensors", weights="any")
    base = read(folder / "base/model.safetensors", weights="any")
    shot = read(next((folder / "alone/finetune").glob("snapshot-*")), weights="any")
    model = family.load(merged)
    buffers = {name for name, _ in model.named_buffers()}
    for name, b in base.tensors.items():
        expected = b if name in buffers else b - alone["w"] * (shot.tensors[name] - b)
        torch.testing.assert_close(
            merged.tensors[name], expected, rtol=0, atol=1e-6 * float(expected[expected.isfinite()].abs().max() + 1e-6)
        )
    assert not torch.isnan(merged.tensors["mask"]).any()
    assert (shot.tensors["pred.weight"] - base.tensors["pred.weight"]).abs().max() > 1e-5  # the fine-tune moved something
    family.open(folder / "vae/autoencoder.safetensors", torch.device("cpu"))
    codes, _ = family.sample(model.eval(), ImageRng([0, 1]), torch.tensor([3, 4]), XARSampling(num_steps=2, cfg_scale=1.5))
    assert torch.isfinite(family.decode(codes)).all()
    assert family.img_size(model) == 32


def test_two_ranks_make_the_same_model(folder, alone):
    """Same noise, labels and count; with dropout 0 the same fine-tune up to the order of sums."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "neon", "run"]
    arguments = [str(write_config(folder, "images")), "--out", str(folder / "together"), "--device", "cpu"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads(done.stdout.strip().splitlines()[-1])
    assert together["ranks"] == 2

    one, two = (open_images(folder / name / "synth") for name in ("alone", "together"))
    assert one.labels.tolist() == two.labels.tolist()
    difference = one.read(range(20)).int() - two.read(range(20)).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 1e-3
    shots = [read(next((folder / name / "finetune").glob("snapshot-*")), weights="any").tensors for name in ("alone", "together")]
    for name, value in shots[0].items():
        if name != "mask":
            torch.testing.assert_close(shots[1][name], value, rtol=0, atol=1e-5 * float(value.abs().max()))
    assert together["value"] == pytest.approx(alone["value"], rel=0.01)


def test_sampled_latents_train_without_the_autoencoder_s_round_trip(folder):
    run = Run(config.load(write_config(folder, "codes")), folder / "codes", World())
    synth = run.synth()
    assert synth.read([0]).shape == (1, 16, 16, 16)
    (snapshot,) = run.finetune()
    assert not (folder / "codes/finetune/encoded").exists()
    tuned, base = (read(path, weights="any").tensors["pred.weight"] for path in (snapshot, folder / "base/model.safetensors"))
    assert 1e-5 < (tuned - base).abs().max() < 0.1


@pytest.mark.slow
def test_the_tiny_autoencoder_reconstructs_held_out_images(tmp_path):
    """A seventh of its config's budget already gives 20 dB on the 1,000 images that it is not trained on."""
    changes = [f'data.path="{ROOT / "demo" / "fashion_base.npz"}"', "autoencoder.train.images=6400"]
    changes += ["autoencoder.train.lr_ramp_images=640", "autoencoder.train.lr_cosine_images=3200"]
    experiment = config.load(ROOT / "configs" / "xar_fashion_vae.toml", changes)
    result = train_autoencoder(experiment, tmp_path, World())
    assert result["held_out"] == 1000
    assert result["psnr_db"] >= 20
