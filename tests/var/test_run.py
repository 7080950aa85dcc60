"""The whole of Neon on VAR with real images: tokeniser and base trained by our own commands, one and two ranks."""

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
from var.family import VAR
from var.sampler import Sampling

ROOT = Path(__file__).resolve().parents[2]
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
    with np.load(ROOT / "demo" / "fashion_base.npz") as data:
        np.savez(folder / "real.npz", images=data["images"][:96], labels=data["labels"][:96])
    extractor = open_extractor("fashion-cnn")
    moments = Moments(extractor.dim)
    moments.update(extractor(open_images(folder / "real.npz").read(range(96))).pool)
    write_reference(folder / "reference.npz", moments, {"extractor": extractor.name})
    experiment = config.load(write_config(folder, "images"))
    assert train_autoencoder(experiment, folder / "tokeniser", World())["held_out"] == 16
    trained = train_base(experiment, folder / "base", World())
    assert trained["steps"] == 8
    assert trained["loss"] < np.log(32)  # nats per token of a uniform guess
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    return Run(config.load(write_config(folder, "images")), folder / "alone", World()).all()


def snapshot(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "finetune").glob("snapshot-*")
    return dict(read(path, weights="raw").tensors)


def test_end_to_end(folder, alone):
    assert set(alone["rows"]) == {"base", "self-trained", "random direction", "neon"}
    assert alone["metric"] == "fd20[fashion-cnn]"
    assert (folder / "alone/report.html").is_file()
    synth = open_images(folder / "alone/synth")
    assert synth.shape == (1, 28, 28)
    assert synth.labels.tolist() == [i % 10 for i in range(24)]


def test_the_merged_file_is_the_formula_and_samples(folder, alone):
    family, merged = VAR(), read(folder / "alone/neon.safetensors", weights="any")
    base, shot = read(folder / "base/model.safetensors", weights="raw"), snapshot(folder / "alone")
    model = family.load(merged)  # also checks levels, mask and zero biases
    parameters = {name for name, _ in model.named_parameters()}
    assert set(merged.tensors) == set(base.tensors)
    for name, b in base.tensors.items():
        expected = b - alone["w"] * (shot[name] - b) if name in parameters else b
        torch.testing.assert_close(
            merged.tensors[name], expected, rtol=0, atol=1e-6 * float(expected[expected.isfinite()].abs().max() + 1e-6)
        )
    assert (shot["head.weight"] - base.tensors["head.weight"]).abs().max() > 1e-5  # the fine-tune moved something
    family.open(folder / "tokeniser/autoencoder.safetensors", torch.device("cpu"))
    codes, _ = family.sample(model.eval(), ImageRng([0, 1]), torch.tensor([3, 4]), Sampling(cfg_scale=1.0))
    assert family.decode(codes).shape == (2, 1, 28, 28)
    assert family.img_size(model) == 28


def test_two_ranks_make_the_same_model(folder, alone):
    """Same noise, labels and count; the same fine-tune up to the order of sums."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "neon", "run"]
    arguments = [str(write_config(folder, "images")), "--out", str(folder / "together"), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads(done.stdout.strip().splitlines()[-1])
    assert together["ranks"] == 2

    one, two = (open_images(folder / name / "synth") for name in ("alone", "together"))
    assert one.labels.tolist() == two.labels.tolist()
    difference = one.read(range(24)).int() - two.read(range(24)).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 1e-3
    ones, twos = snapshot(folder / "alone"), snapshot(folder / "together")
    for name, value in ones.items():
        if name != "attn_bias_for_masking":
            torch.testing.assert_close(twos[name], value, rtol=0, atol=1e-5 * float(value.abs().max()))
    assert together["value"] == pytest.approx(alone["value"], rel=0.01)


def test_ranks_sample_and_train_on_the_same_tokens(folder, alone):
    """store = "codes" on 1 and 2 ranks: nothing is tokenised again, and at least 99.9 % of the sampled tokens are equal."""
    path = write_config(folder, "codes")
    run = Run(config.load(path), folder / "codes", World())
    tokens = run.synth().read(range(24))
    assert tokens.shape == (24, 70)
    assert tokens.dtype == torch.int64
    run.finetune()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "neon", "finetune"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [str(path), "--out", str(folder / "codes2"), "--device", "cpu", "--set", "sampling.batch=3"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    again = torch.cat([torch.from_numpy(np.load(shard)["codes"]) for shard in sorted((folder / "codes2/synth").glob("shard-*.npz"))])
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
