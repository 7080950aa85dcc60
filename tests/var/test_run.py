"""The whole of Neon on VAR with real images: tokeniser and base trained by our own commands, one and two ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
from tests.commands import started
from tests.whole_run import assert_finished, assert_merged, assert_same_run, snapshot, write_real_images
from var.family import VAR
from var.options import Sampling

CONFIG = """
family = "var"
[data]
path = "{folder}/real.npz"
[autoencoder]
held_out = 16
[autoencoder.arch]
patch_nums = [1, 2, 4, 7]
ch = 8
ch_mult = [1, 1, 2]
num_res_blocks = 1
z_channels = 8
image_channels = 1
num_groups = 4
vocab_size = 32
[autoencoder.train]
images = 256
batch = 16
lr = 5e-3
[model]
depth = 2
embed_dim = 32
heads = 2
patch_nums = [1, 2, 4, 7]
num_classes = 10
vocabulary = 32
code_width = 8
[train]
images = 128
batch = 16
lr = 3e-3
max_grad_norm = 2.0
[base]
checkpoint = "{folder}/base/model.safetensors"
weights = "raw"
autoencoder = "{folder}/tokeniser/autoencoder.safetensors"
[sampling]
top_k = 20
top_p = 0.95
uint8 = "round"
batch = 8
[synth]
num_images = 24
shard_images = 8
cfg_scale = 1.0
store = "{store}"
[finetune]
images = 48
batch = 12
lr = 1e-3
optimizer = "adamw"
betas = [0.9, 0.95]
max_grad_norm = 2.0
[select]
num_images = 12
first_seed = 1000
w = [1.0]
cfg_scale = [1.0]
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
    """Real images, their reference statistics, a tokeniser and a base model trained on them for a few steps."""
    folder = tmp_path_factory.mktemp("var")
    write_real_images(folder, 96)
    experiment = load(write_config(folder, "images"))
    assert train_autoencoder(experiment, folder / "tokeniser", World())["held_out"] == 16
    trained = train_base(experiment, folder / "base", World())
    assert trained["steps"] == 8
    assert trained["loss"] < np.log(32)  # nats per token of a uniform guess
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    return Run(load(write_config(folder, "images")), folder / "alone", World()).all()


def test_end_to_end(folder, alone):
    assert_finished(folder / "alone", alone, num_images=20)
    synth = open_images(folder / "alone/synth")
    assert synth.shape == (1, 28, 28)
    assert synth.labels.tolist() == [i % 10 for i in range(24)]


def test_the_merged_file_is_the_formula_and_samples(folder, alone):
    family, merged = VAR(), read(folder / "alone/neon.safetensors", weights="any")
    model = family.load(merged)  # also checks levels, mask and zero biases
    moves = assert_merged(folder / "alone", model, folder / "base/model.safetensors", alone["w"])
    assert moves["head.weight"] > 1e-5  # the fine-tune moved something
    family.open(folder / "tokeniser/autoencoder.safetensors", torch.device("cpu"))
    codes, _ = family.sample(model.eval(), ImageRng([0, 1]), torch.tensor([3, 4]), Sampling(cfg_scale=1.0))
    assert family.decode(codes).shape == (2, 1, 28, 28)
    assert family.img_size(model) == 28


def test_two_ranks_make_the_same_model(folder, alone):
    """Same noise, labels and count; the same fine-tune up to the order of sums."""
    out = folder / "together"
    together = started("-m", "neon", "run", write_config(folder, "images"), "--out", out, "--device", "cpu", ranks=2)
    assert_same_run(folder / "alone", out, (alone, together), num_synth=24, constants={"attn_bias_for_masking"})


def test_ranks_sample_and_train_on_the_same_tokens(folder, alone):
    """store = "codes" on 1 and 2 ranks: nothing is tokenised again, and at least 99.9 % of the sampled tokens are
    equal."""
    path = write_config(folder, "codes")
    run = Run(load(path), folder / "codes", World())
    tokens = run.synth().read(range(24))
    assert tokens.shape == (24, 70)
    assert tokens.dtype == torch.int64
    run.finetune()
    out = folder / "codes2"
    started("-m", "neon", "finetune", path, "--out", out, "--device", "cpu", "--set", "sampling.batch=3", ranks=2)
    again = torch.cat(
        [torch.from_numpy(np.load(shard)["codes"]) for shard in sorted((out / "synth").glob("shard-*.npz"))]
    )
    assert (tokens == again).float().mean() >= 0.999
    base, ones, twos = (
        read(folder / "base/model.safetensors", weights="raw").tensors,
        snapshot(folder / "codes"),
        snapshot(folder / "codes2"),
    )
    for name in ("head.weight", "blocks.1.attn.mat_qkv.weight"):
        torch.testing.assert_close(twos[name], ones[name], rtol=0, atol=1e-5 * float(ones[name].abs().max()))
        assert 1e-5 < (ones[name] - base[name]).abs().max() < 0.1
    of_images = snapshot(folder / "alone")
    assert not torch.allclose(of_images["head.weight"], ones["head.weight"], atol=1e-5)  # another S
