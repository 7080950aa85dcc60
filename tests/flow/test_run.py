"""The whole of Neon on flow matching with real images: a base trained by our own command, one and two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flow.family import Flow
from flow.options import Sampling
from neon.checkpoints.checkpoint import read
from neon.images.formats import open_images
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.pipeline.train_base import train_base
from neon.runtime.distributed import World
from neon.seeds import image_rng
from tests.commands import started
from tests.whole_run import assert_finished, assert_merged, assert_same_run, snapshot, write_real_images

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


def write_config(
    folder: Path, name: str, *, store: str = "images", pairing: str = "sampled", micro_batch: int = 24
) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(
        CONFIG.format(folder=folder, store=store, num_synth=NUM_SYNTH, pairing=pairing, micro_batch=micro_batch)
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Real images, their reference statistics, a base model trained on them for a few steps."""
    folder = tmp_path_factory.mktemp("flow")
    write_real_images(folder, 500)
    assert train_base(load(write_config(folder, "base")), folder / "base", World())["steps"] == 16
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    return Run(load(write_config(folder, "alone")), folder / "alone", World()).all()


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
    assert distance[0] < 0.5 * distance[1]


def test_end_to_end(folder, alone):
    assert_finished(folder / "alone", alone, num_images=12)
    synth = open_images(folder / "alone/synth")
    assert synth.labels.tolist() == [i % 10 for i in range(NUM_SYNTH)]
    base = Flow().load(read(folder / "base/model.safetensors"))
    codes = images_of(base, synth.labels.tolist(), 4)  # [synth.sampling], not [sampling]
    expected = ((codes + 1) * 127.5).round().clamp(0, 255)
    assert (synth.read(range(NUM_SYNTH)) - expected).abs().max() <= 1


def test_the_merged_file_is_the_formula_and_samples(folder, alone):
    model = Flow().load(read(folder / "alone/neon.safetensors", weights="any"))
    moves = assert_merged(folder / "alone", model, folder / "base/model.safetensors", alone["w"])
    for name in ("label_emb.weight", "time_embed.0.weight", "input_blocks.0.0.weight", "out.2.bias"):
        assert moves[name] > 1e-5, name
    assert images_of(model, [3, 4], 2).isfinite().all()


def test_two_ranks_make_the_same_model(folder, alone):
    """Same noise, labels and count; the same fine-tune up to the order of sums."""
    out = folder / "together"
    together = started("-m", "neon", "run", write_config(folder, "together"), "--out", out, "--device", "cpu", ranks=2)
    assert_same_run(folder / "alone", out, (alone, together), num_synth=NUM_SYNTH)


@pytest.mark.parametrize(("name", "settings"), [("codes", {"store": "codes"}), ("assigned", {"pairing": "assigned"})])
def test_another_s_or_pairing_is_another_fine_tune(folder, alone, name, settings):
    run = Run(load(write_config(folder, name, **settings)), folder / name, World())
    codes = run.synth().read(range(NUM_SYNTH))
    pixels = open_images(folder / "alone/synth").read(range(NUM_SYNTH))
    made = ((codes + 1) * 127.5).round().clamp(0, 255) if name == "codes" else codes.int()
    assert (made - pixels).abs().max() <= 1
    run.finetune()
    ones, others = snapshot(folder / "alone"), snapshot(folder / name)
    assert not torch.allclose(ones["input_blocks.0.0.weight"], others["input_blocks.0.0.weight"], atol=1e-6)


def test_accumulation_rounds_do_not_change_the_update(folder, alone):
    run = Run(load(write_config(folder, "rounds", micro_batch=7)), folder / "rounds", World())
    run.finetune()
    ones, others = snapshot(folder / "alone"), snapshot(folder / "rounds")
    for name, value in ones.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-5 * float(value.abs().max()), msg=name)
