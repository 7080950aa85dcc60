"""The whole of Neon on IMM in pixel space with real images: a base trained by our own command, one and two ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from imm.family import IMM
from imm.options import Sampling
from neon.checkpoints.checkpoint import read, write
from neon.images.formats import open_images
from neon.pipeline.check import check
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.pipeline.train_base import train_base
from neon.runtime.distributed import World
from neon.seeds import image_rng
from tests.commands import started
from tests.whole_run import assert_finished, assert_merged, assert_same_run, snapshot, write_real_images

NUM_SYNTH = 24
CONFIG = """
family = "imm"
[data]
path = "{folder}/real.npz"
[model]
img_resolution = 28
img_channels = 1
label_dim = 10
num_classes = 10
model_type = "DiT"
patch_size = 7
hidden_size = 32
depth = 2
num_heads = 2
temb_type = "stride"
[train]
images = 1_536
batch = 32
lr = 3e-3
lr_ramp_images = 320
ema_decay = 0.9
[train.objective]
k = 6.0
a = 1.0
[base]
checkpoint = "{folder}/base/model.safetensors"
[sampling]
num_steps = 2
uint8 = "round"
batch = 10
[synth]
num_images = {num_synth}
shard_images = 8
cfg_scale = 1.5
store = "{store}"
[synth.sampling]
num_steps = 4
[finetune]
images = 96
batch = 24
lr = 1e-3
optimizer = "adamw"
ema_decay = 0.5
[finetune.objective]
group_size = 4
[select]
num_images = 20
first_seed = 1000
w = [1.0]
cfg_scale = [1.0, 1.5]
[report]
num_images = 20
first_seed = 2000
cfg_scale = "selected"
extractors = {{ fashion-cnn = "{folder}/reference.npz" }}
"""


def write_config(folder: Path, store: str = "images") -> Path:
    path = folder / f"{store}.toml"
    path.write_text(CONFIG.format(folder=folder, store=store, num_synth=NUM_SYNTH))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Real images, their reference statistics, a base model trained on them for a few steps."""
    folder = tmp_path_factory.mktemp("imm")
    write_real_images(folder, 500)
    assert train_base(load(write_config(folder)), folder / "base", World())["steps"] == 48
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    return Run(load(write_config(folder)), folder / "alone", World()).all()


def images_of(model, labels, **options) -> torch.Tensor:
    rng = image_rng(0, range(len(labels)), "cpu")
    return IMM().sample(model.eval(), rng, torch.tensor(labels), Sampling(**options))[0]


def test_training_learned_the_images(folder):
    """The base's mean image moved towards the real one from an untrained network's, whose images are noise around 0
    (measured: 0.64)."""
    family, found = IMM(), read(folder / "base/model.safetensors")
    real = open_images(folder / "real.npz").read(range(500)).float().mean(0) / 127.5 - 1
    trained, fresh = family.load(found), family.build(found.arch)
    labels = [i % 10 for i in range(100)]
    distance = [
        (images_of(net, labels, num_steps=2).mean(0) - real).square().mean().sqrt().item() for net in (trained, fresh)
    ]
    assert distance[0] < 0.75 * distance[1]


def test_end_to_end(folder, alone):
    assert_finished(folder / "alone", alone, num_images=20)
    synth = open_images(folder / "alone/synth")
    assert synth.labels.tolist() == [i % 10 for i in range(NUM_SYNTH)]
    base = IMM().load(read(folder / "base/model.safetensors"))
    codes = images_of(base, synth.labels.tolist(), num_steps=4, cfg_scale=1.5)  # [synth.sampling], not [sampling]
    expected = ((codes + 1) * 127.5).round().clamp(0, 255)
    assert (synth.read(range(NUM_SYNTH)) - expected).abs().max() <= 1


def test_the_merged_file_is_the_formula_and_samples(folder, alone):
    model = IMM().load(read(folder / "alone/neon.safetensors", weights="any"))
    moves = assert_merged(folder / "alone", model, folder / "base/model.safetensors", alone["w"])
    for name in ("model.pos_embed", "model.x_embedder.proj.weight", "model.s_embedder.mlp.0.weight"):
        assert moves[name] > 1e-5, name
    assert images_of(model, [3, 4]).isfinite().all()


def test_two_ranks_make_the_same_model(folder, alone):
    """Same noise, labels and count; the same fine-tune up to the order of sums."""
    out = folder / "together"
    together = started("-m", "neon", "run", write_config(folder), "--out", out, "--device", "cpu", ranks=2)
    assert_same_run(folder / "alone", out, (alone, together), num_synth=NUM_SYNTH)


def test_guidance_of_an_unconditional_model_is_refused_before_any_image(folder):
    """The network alone knows that it has no classes; at cfg_scale = 1 it samples."""
    net = {"img_resolution": 28, "img_channels": 1, "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1}
    net["attn_resolutions"] = []
    write(folder / "plain.safetensors", IMM().build(net).state_dict(), metadata={"arch": net, "weights": "ema"})
    path = folder / "plain.toml"
    text = CONFIG.format(folder=folder, store="images", num_synth=NUM_SYNTH).replace("cfg_scale = 1.5", "cfg_scale = 1")
    path.write_text(re.sub(r"\[data\](.*\n)+?(?=\[base\])", "", text).replace("base/model", "plain"))
    config = load(path)
    refusal = r"select\.cfg_scale = 1\.5: guidance \(cfg_scale = 1\.5\) needs a class-conditional network"
    with pytest.raises(ValueError, match=refusal):
        Run(config, folder / "plain", World()).all()
    assert not (folder / "plain").exists()
    findings = {found.name: found for found in check(config, path, torch.device("cpu"))}
    assert [name for name, found in findings.items() if not found.is_ok] == ["every guidance"]
    assert re.search(refusal, findings["every guidance"].text)
    one = load(path, ["select.cfg_scale=[1.0]"])
    assert all(found.is_ok for found in check(one, path, torch.device("cpu")))


def test_stored_codes_are_another_s(folder, alone):
    """store = "codes" trains on what the sampler made, not on its rounded and clipped pixels."""
    run = Run(load(write_config(folder, "codes")), folder / "codes", World())
    codes = run.synth().read(range(NUM_SYNTH))
    assert codes.dtype == torch.float32
    pixels = open_images(folder / "alone/synth").read(range(NUM_SYNTH))
    assert (((codes + 1) * 127.5).round().clamp(0, 255) - pixels).abs().max() <= 1
    run.finetune()
    ones, others = snapshot(folder / "alone"), snapshot(folder / "codes")
    assert not torch.allclose(ones["model.x_embedder.proj.weight"], others["model.x_embedder.proj.weight"], atol=1e-6)
