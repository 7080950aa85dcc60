"""The whole of Neon on flow matching with real images: a base trained by our own command, one and two ranks."""

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
from flow.family import Flow, Sampling
from neon import config
from neon.checkpoint import read
from neon.data import open_images
from neon.distributed import World
from neon.run import Run
from neon.seeds import image_rng
from neon.train_base import train_base

ROOT = Path(__file__).resolve().parents[2]
NUM_SYNTH = 24
CONFIG = """
family = "flow"
[data]
path = "{folder}/real.npz"
[model]
dim = [1, 28, 28]
pixel_unshuffle = 4
num_channels = 32
num_res_blocks = 1
channel_mult = [2]
attention_resolutions = "7"
use_scale_shift_norm = true
class_cond = true
num_classes = 10
[train]
images = 512
batch = 32
lr = 3e-3
lr_ramp_images = 128
ema_decay = 0.9
max_grad_norm = 1.0
[base]
checkpoint = "{folder}/base/model.safetensors"
[sampling]
solver = "euler"
num_steps = 3
uint8 = "round"
batch = 10
[synth]
num_images = {num_synth}
shard_images = 8
store = "{store}"
[synth.sampling]
num_steps = 4
[finetune]
images = 96
batch = 24
micro_batch = {micro_batch}
lr = 2e-4
lr_ramp_images = 192          # as published, only shorter: without it Adam turns rounding into steps
ema_decay = 0.5
max_grad_norm = 1.0
[finetune.objective]
kind = "otcfm"
pairing = "{pairing}"
flip = 0.5
[select]
num_images = 12
first_seed = 1000
w = [1.0]
[report]
num_images = 12
first_seed = 2000
extractors = {{ fashion-cnn = "{folder}/reference.npz" }}
"""


def write_config(folder: Path, name: str, *, store: str = "images", pairing: str = "sampled", micro_batch: int = 24) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(CONFIG.format(folder=folder, store=store, num_synth=NUM_SYNTH, pairing=pairing, micro_batch=micro_batch))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Real images, their reference statistics, a base model trained on them for a few steps."""
    folder = tmp_path_factory.mktemp("flow")
    with np.load(ROOT / "demo" / "fashion_base.npz") as data:
        np.savez(folder / "real.npz", images=data["images"][:500], labels=data["labels"][:500])
    extractor = open_extractor("fashion-cnn")
    moments = Moments(extractor.dim)
    moments.update(extractor(open_images(folder / "real.npz").read(range(500))).pool)
    write_reference(folder / "reference.npz", moments, {"extractor": extractor.name})
    assert train_base(config.load(write_config(folder, "base")), folder / "base", World())["steps"] == 16
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    return Run(config.load(write_config(folder, "alone")), folder / "alone", World()).all()


def snapshot(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "finetune").glob("snapshot-*")
    return dict(read(path, weights="any").tensors)


def images_of(model, labels, num_steps):
    rng = image_rng(0, range(len(labels)), "cpu")
    return Flow().sample(model.eval(), rng, torch.tensor(labels), Sampling(solver="euler", num_steps=num_steps))[0]


def test_training_learned_the_images(folder):
    """The base's mean image moved towards the real one; an untrained network leaves the noise as it is."""
    family, found = Flow(), read(folder / "base/model.safetensors")
    real = open_images(folder / "real.npz").read(range(500)).float().mean(0) / 127.5 - 1
    trained, fresh = family.load(found), family.build(found.arch)
    labels = [i % 10 for i in range(100)]
    distance = [(images_of(net, labels, 3).mean(0) - real).square().mean().sqrt().item() for net in (trained, fresh)]
    print("distance to the mean image:", distance)
    assert distance[0] < 0.5 * distance[1]


def test_end_to_end(folder, alone):
    assert set(alone["rows"]) == {"base", "self-trained", "random direction", "neon"}
    assert alone["metric"] == "fd12[fashion-cnn]"
    assert (folder / "alone/report.html").is_file()
    synth = open_images(folder / "alone/synth")
    assert synth.labels.tolist() == [i % 10 for i in range(NUM_SYNTH)]
    base = Flow().load(read(folder / "base/model.safetensors"))
    codes = images_of(base, synth.labels.tolist(), 4)  # [synth.sampling], not [sampling]
    expected = ((codes + 1) * 127.5).round().clamp(0, 255)
    assert (synth.read(range(NUM_SYNTH)) - expected).abs().max() <= 1


def test_the_merged_file_is_the_formula_and_samples(folder, alone):
    merged, base = read(folder / "alone/neon.safetensors", weights="any"), read(folder / "base/model.safetensors")
    shot = snapshot(folder / "alone")
    assert list(merged.tensors) == list(base.tensors)
    for name, b in base.tensors.items():
        expected = b - alone["w"] * (shot[name] - b)
        torch.testing.assert_close(merged.tensors[name], expected, rtol=0, atol=1e-6 * float(expected.abs().max() + 1e-6))
    moved = {name for name in shot if (shot[name] - base.tensors[name]).abs().max() > 1e-5}
    assert {"label_emb.weight", "time_embed.0.weight", "input_blocks.0.0.weight", "out.2.bias"} <= moved
    assert images_of(Flow().load(merged), [3, 4], 2).isfinite().all()


def test_two_ranks_make_the_same_model(folder, alone):
    """Same noise, labels and count; the same fine-tune up to the order of sums."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "neon", "run"]
    arguments = [str(write_config(folder, "together")), "--out", str(folder / "together"), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads(done.stdout.strip().splitlines()[-1])
    assert together["ranks"] == 2
    one, two = (open_images(folder / name / "synth") for name in ("alone", "together"))
    assert len(one) == len(two) == NUM_SYNTH
    assert one.labels.tolist() == two.labels.tolist()
    difference = one.read(range(NUM_SYNTH)).int() - two.read(range(NUM_SYNTH)).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 1e-3
    ones, twos = snapshot(folder / "alone"), snapshot(folder / "together")
    for name, value in ones.items():
        torch.testing.assert_close(twos[name], value, rtol=0, atol=1e-5 * float(value.abs().max()), msg=name)
    assert together["value"] == pytest.approx(alone["value"], rel=0.01)


@pytest.mark.parametrize(("name", "settings"), [("codes", {"store": "codes"}), ("assigned", {"pairing": "assigned"})])
def test_another_s_or_pairing_is_another_fine_tune(folder, alone, name, settings):
    run = Run(config.load(write_config(folder, name, **settings)), folder / name, World())
    codes = run.synth().read(range(NUM_SYNTH))
    pixels = open_images(folder / "alone/synth").read(range(NUM_SYNTH))
    made = ((codes + 1) * 127.5).round().clamp(0, 255) if name == "codes" else codes.int()
    assert (made - pixels).abs().max() <= 1
    run.finetune()
    ones, others = snapshot(folder / "alone"), snapshot(folder / name)
    assert not torch.allclose(ones["input_blocks.0.0.weight"], others["input_blocks.0.0.weight"], atol=1e-6)


def test_accumulation_rounds_do_not_change_the_update(folder, alone):
    run = Run(config.load(write_config(folder, "rounds", micro_batch=7)), folder / "rounds", World())
    run.finetune()
    ones, others = snapshot(folder / "alone"), snapshot(folder / "rounds")
    for name, value in ones.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-5 * float(value.abs().max()), msg=name)
