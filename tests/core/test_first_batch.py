"""A family of one's own that returns something else than the contract says is stopped at the first batch, by name."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from neon import first_batch
from neon.checkpoints import checkpoint
from neon.cli.main import main
from neon.pipeline.check import check_first_images
from neon.pipeline.experiment import load
from tests.commands import invoke
from tests.core.line_family import Line, Pixels

SAMPLE, LOSS, DRAW, DECODE = Line.sample, Line.loss, Line.draw, Line.decode


@dataclass(frozen=True)
class Mistake:
    method: str
    does: object
    said: str


MISTAKES = {
    "no tuple": Mistake(
        "sample", lambda *a: SAMPLE(*a)[0], r"Line\.sample must return \(codes, labels\).*it returned a tensor \(4, 1"
    ),
    "labels as floats": Mistake(
        "sample", lambda *a: (SAMPLE(*a)[0], SAMPLE(*a)[1].float()), r"the labels are a tensor \(4,\) of float32"
    ),
    "one image too few": Mistake(
        "sample", lambda *a: (SAMPLE(*a)[0][1:], None), r"the codes are a tensor \(3, 1, 4, 4\)"
    ),
    "labels that are kept back": Mistake(
        "sample", lambda *a: (SAMPLE(*a)[0], None), r"num_classes is 3, so it must return the labels that it used"
    ),
    "bytes": Mistake(
        "decode",
        lambda self, codes: ((codes + 1) * 127.5).to(torch.uint8),
        r"Line\.decode must return float images \(4, C, H, W\) in \[-1, 1\].* of uint8\. Bytes become",
    ),
    "no channels": Mistake("decode", lambda self, codes: codes[:, 0], r"it returned a tensor \(4, 4, 4\) of float32"),
    "a loss without a graph": Mistake("loss", lambda *a: LOSS(*a).detach(), r"Line\.loss does not depend on the model"),
    "mean over the batch": Mistake(
        "loss",
        lambda *a: LOSS(*a).mean(),
        r"Line\.loss must return the loss of every image, a float tensor \(16,\).*average over all dimensions but the "
        "first",
    ),
    "loss per pixel": Mistake("loss", lambda *a: LOSS(*a)[:, None], r"it returned a tensor \(16, 1\)"),
    "draws of another batch": Mistake(
        "draw", lambda *a: {"noise": torch.zeros(3, 1, 4, 4)}, r"Line\.draw must return .* 'noise' is a tensor \(3, 1"
    ),
    "draws that are a tensor": Mistake("draw", lambda *a: torch.zeros(16), r"must return a dict .* a tensor"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_run_stops_at_the_first_batch_with_what_to_return(line_config, tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(Line, mistake.method, mistake.does)
    done = invoke(main, "run", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), "one line, no traceback"
    assert re.search(mistake.said, done.stderr), done.stderr
    assert not list((tmp_path / "run").glob("finetune/snapshot-*"))


def test_the_unit_interval_is_told_from_the_right_one():
    images = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert first_batch.lies_in_unit_interval(images)
    assert not first_batch.lies_in_unit_interval(images * 2 - 1)
    assert not first_batch.lies_in_unit_interval(torch.full((8, 3, 4, 4), 0.5)), "one grey says nothing"


@pytest.mark.parametrize(
    ("method", "does", "said"),
    [
        ("plain", lambda self, state: None, "plain must return a state dict, tensors by name; it returned NoneType"),
        ("plain", lambda self, state: list(state), "plain must return a state dict, tensors by name; it returned list"),
        ("adapted", lambda self, model, how: None, "adapted must return the network, a torch.nn.Module; it returned"),
    ],
)
def test_what_is_first_used_after_hours_is_tried_before_any_image(
    line_config, tmp_path, monkeypatch, method, does, said
):
    monkeypatch.setattr(Line, method, does)
    for command in ("run", "finetune"):
        done = invoke(main, command, line_config, "--out", tmp_path / "run", "--device", "cpu")
        assert done.exit_code == 1
        assert f"Line.{said}" in done.stderr
        assert not (tmp_path / "run/synth").exists()


def test_the_network_is_made_after_open(line_config, tmp_path, monkeypatch):
    """A family may know its network's size, or what to train of it, from its autoencoder."""
    opened = []

    def adapted(self, model, how):
        assert opened, "adapted was called before open"
        return model

    monkeypatch.setattr(Line, "open", lambda self, autoencoder, device: opened.append(device))
    monkeypatch.setattr(Line, "adapted", adapted)
    done = invoke(main, "finetune", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 0, done.stderr


def test_what_is_tried_before_the_images_changes_nothing_after(line_config, tmp_path, monkeypatch):
    """A family of one's own may draw its first weights, a LoRA's for example, from torch's own generator."""
    drawn = []

    def adapted(self, model, how):
        drawn.append(torch.rand(()))
        return model

    monkeypatch.setattr(Line, "adapted", adapted)
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    done = invoke(main, "finetune", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    assert drawn == [expected, expected], "once to try it, once to train it"


def run_with(line_config, tmp_path, monkeypatch, sample):
    monkeypatch.setattr(Line, "sample", sample)
    return invoke(main, "run", line_config, "--out", tmp_path / "run", "--device", "cpu")


def test_a_run_refuses_global_noise_and_batch_statistics(line_config, tmp_path, monkeypatch):
    def noisy(self, model, rng, labels, how):
        codes, used = SAMPLE(self, model, rng, labels, how)
        return codes + 0.01 * torch.randn(codes.shape), used

    done = run_with(line_config, tmp_path, monkeypatch, noisy)
    assert done.exit_code == 1
    assert "same seed, same image: Line.sample gave other images for the same seeds" in done.stderr

    def centred(self, model, rng, labels, how):
        codes, used = SAMPLE(self, model, rng, labels, how)
        return codes - codes.mean(0), used

    done = run_with(line_config, tmp_path, monkeypatch, centred)
    assert done.exit_code == 1
    assert "batch independence: an image depends on the others" in done.stderr


def test_a_run_warns_of_the_unit_interval(line_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Line, "decode", lambda self, codes: codes.sigmoid())
    done = invoke(main, "synth", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "warning: all values lie in [0." in done.stderr


def test_the_first_images_change_nothing_that_follows(line_config, tmp_path):
    """The global generator's state, from which dropout masks come, is the same before and after."""
    config = load(line_config)
    family = config.family()
    model = family.load(checkpoint.read(tmp_path / "base.safetensors"))
    state = torch.get_rng_state()
    check_first_images(config, family, model, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)


def fails(monkeypatch, method):
    """Line.METHOD raises a KeyError."""

    def failing(self, *arguments):
        return {}["absent"]

    failing.__code__ = failing.__code__.replace(co_name=method)  # as if it were written in the class
    monkeypatch.setattr(Line, method, failing)


DATA = ("--set", "data.path='data.npz'")
BASE = ("--set", "model={}", "--set", "train={images=32, batch=8, lr=1e-3}", *DATA)


@pytest.mark.parametrize(
    ("command", "method", "options"),
    [
        ("run", "sample", ()),
        ("run", "loss", ()),
        ("run", "draw", ()),
        ("synth", "num_classes", ()),
        ("synth", "decode", ()),
        ("finetune", "encode", ()),
        ("finetune", "decays", ()),
        ("search", "sample", ()),
        ("eval", "sample", ("--set", "report.cfg_scale=1.0")),
        ("train", "loss", BASE),
        ("train", "build", BASE),
        ("diagnose", "loss", (*DATA, "--set", "finetune.batch=8")),
        ("sample", "sample", ("--family", "tests.core.line_family:Line", "--set", "cfg_scale=1.0")),
        ("run", "sample", ("--dry-run",)),
    ],
)
def test_an_error_of_ones_own_is_a_sentence_in_every_command(
    line_config, tmp_path, monkeypatch, command, method, options
):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1)).astype(np.uint8)
    np.savez("data.npz", images=images, labels=np.arange(64) % 3)
    if command == "search":
        assert invoke(main, "finetune", line_config, "--out", "out", "--device", "cpu").exit_code == 0
    fails(monkeypatch, method)
    about = "base.safetensors" if command == "sample" else line_config
    done = invoke(main, command, about, "--out", "out", "--device", "cpu", *options)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), "no traceback"
    assert re.search(rf"^Error: Line\.{method}: KeyError: 'absent' \(.*test_first_batch\.py:\d+\)", done.stderr, re.M)
    assert re.search(rf"^  expected Line\.{method}\(self.*\): [A-Z]", done.stderr, re.M), "what it has to give"
    assert "NEON_TRACEBACK=1 before the command" in done.stderr


def test_the_traceback_is_shown_where_it_is_asked_for(line_config, tmp_path, monkeypatch):
    fails(monkeypatch, "sample")
    monkeypatch.setenv("NEON_TRACEBACK", "1")
    done = invoke(main, "synth", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert isinstance(done.exception, KeyError)


RETURNED = {
    "num_classes": (None, r"Line\.num_classes must return a whole number >= 0, it returned None"),
    "group": (0, r"Line\.group must return a whole number >= 1, it returned 0"),
    "load": (None, r"Line\.load must return the network, a torch\.nn\.Module; it returned NoneType"),
    "build": (None, r"Line\.build must return the network"),
    "adapted": (None, r"Line\.adapted must return the network"),
    "encode": (
        torch.zeros(2, 3),
        r"Line\.encode must return a tensor with the batch \(7\).*returned a tensor \(2, 3\)",
    ),
    "autoencoder_modules": (
        None,
        r"Line\.autoencoder_modules must return a list of the networks.* it returned NoneType",
    ),
    "plain": (None, r"Line\.plain must return a state dict, tensors by name; it returned NoneType"),
    "trains": (False, r"there is nothing to train: Line\.trains is false for every parameter"),
}


@pytest.mark.parametrize("method", RETURNED)
def test_what_the_other_methods_return_is_looked_at_too(line_config, tmp_path, monkeypatch, method):
    """num_classes without a `return` would make a class-conditional network an unconditional one."""
    returned, said = RETURNED[method]
    monkeypatch.setattr(Line, method, lambda *arguments: returned)
    done = invoke(main, "finetune", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), "one line, no traceback"
    assert re.search(said, done.stderr), done.stderr


def test_a_loss_that_changes_what_its_gradient_needs_is_a_line(line_config, tmp_path, monkeypatch):
    def loss(*arguments):
        found = LOSS(*arguments).sqrt()
        root = found.sqrt()
        found.mul_(2)
        return root

    monkeypatch.setattr(Line, "loss", loss)
    done = invoke(main, "finetune", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert "Error: the loss of Line.loss cannot be differentiated: one of the variables needed" in done.stderr


def test_a_mistake_in_draw_is_not_taken_for_a_look_at_the_codes(line_config, tmp_path, monkeypatch):
    def draw(self, rng, codes, labels, how):
        return {"noise": rng.normal((1, 4, 4)) + torch.zeros(3)}

    monkeypatch.setattr(Line, "draw", draw)
    done = invoke(main, "finetune", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert "Error: Line.draw: RuntimeError: The size of tensor a (4) must match" in done.stderr
    assert "draws_see_codes" not in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_a_line_that_says_what_needs_less(line_config, tmp_path, monkeypatch, error):
    def sample(*arguments):
        raise error

    done = run_with(line_config, tmp_path, monkeypatch, sample)
    assert done.exit_code == 1
    assert "Error: out of memory: " in done.stderr
    assert "sampling.batch" in done.stderr


def test_an_extractor_of_ones_own_is_told_what_to_return(line_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Pixels, "extract", lambda self, images: images.flatten(1).float())
    done = invoke(main, "run", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert "Error: Pixels.extract must return Features(pool, logits)" in done.stderr
