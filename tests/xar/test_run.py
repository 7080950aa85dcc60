"""The whole of Neon on xAR with real images: autoencoder and base trained by our own commands, one and two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neon.checkpoints.checkpoint import read
from neon.images.formats import open_images
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.pipeline.train_autoencoder import train_autoencoder
from neon.pipeline.train_base import train_base
from neon.runtime.distributed import World
from neon.seeds import ImageRng
from tests.commands import ROOT, started
from tests.whole_run import assert_finished, assert_merged, assert_same_run, write_real_images
from xar.family import XAR
from xar.options import Sampling

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
    write_real_images(folder, 96)
    experiment = load(write_config(folder, "images"))
    assert train_autoencoder(experiment, folder / "vae", World())["held_out"] == 16
    assert train_base(experiment, folder / "base", World())["steps"] == 4
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    return Run(load(write_config(folder, "images")), folder / "alone", World()).all()


def test_end_to_end(folder, alone):
    assert_finished(folder / "alone", alone, num_images=20)
    synth = open_images(folder / "alone/synth")
    assert synth.shape == (1, 32, 32)
    assert synth.labels.tolist() == [i % 10 for i in range(20)]


def test_the_merged_file_is_the_formula_and_samples(folder, alone):
    family, merged = XAR(), read(folder / "alone/neon.safetensors", weights="any")
    model = family.load(merged)
    moves = assert_merged(folder / "alone", model, folder / "base/model.safetensors", alone["w"])
    assert moves["pred.weight"] > 1e-5  # the fine-tune moved something
    assert not torch.isnan(merged.tensors["mask"]).any()
    family.open(folder / "vae/autoencoder.safetensors", torch.device("cpu"))
    codes, _ = family.sample(model.eval(), ImageRng([0, 1]), torch.tensor([3, 4]), Sampling(num_steps=2, cfg_scale=1.5))
    assert torch.isfinite(family.decode(codes)).all()
    assert family.img_size(model) == 32


def test_two_ranks_make_the_same_model(folder, alone):
    """Same noise, labels and count; with dropout 0 the same fine-tune up to the order of sums."""
    out = folder / "together"
    together = started("-m", "neon", "run", write_config(folder, "images"), "--out", out, "--device", "cpu", ranks=2)
    assert_same_run(folder / "alone", out, (alone, together), num_synth=20, constants={"mask"})


def test_sampled_latents_train_without_the_autoencoder_s_round_trip(folder):
    run = Run(load(write_config(folder, "codes")), folder / "codes", World())
    synth = run.synth()
    assert synth.read([0]).shape == (1, 16, 16, 16)
    (snapshot,) = run.finetune()
    assert not (folder / "codes/finetune/encoded").exists()
    tuned, base = (
        read(path, weights="any").tensors["pred.weight"] for path in (snapshot, folder / "base/model.safetensors")
    )
    assert 1e-5 < (tuned - base).abs().max() < 0.1


@pytest.mark.slow
def test_the_tiny_autoencoder_reconstructs_held_out_images(tmp_path):
    """A seventh of its config's budget already gives 20 dB on the 1,000 images that it is not trained on."""
    changes = [f'data.path="{ROOT / "demo" / "fashion_base.npz"}"', "autoencoder.train.images=6400"]
    changes += ["autoencoder.train.lr_ramp_images=640", "autoencoder.train.lr_cosine_images=3200"]
    experiment = load(ROOT / "configs" / "xar_fashion_vae.toml", changes)
    result = train_autoencoder(experiment, tmp_path, World())
    assert result["held_out"] == 1000
    assert result["psnr_db"] >= 20
