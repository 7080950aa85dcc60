"""`neon check`: a family that keeps the contract passes; each way of breaking it fails at its own check, in a sentence
that says what to do."""

from dataclasses import dataclass

import pytest
import torch

from neon.cli.main import main
from tests.commands import invoke, last_object
from tests.core.line_family import Line, Mean

SAMPLE, LOSS, FORWARD = Line.sample, Line.loss, Mean.__init__


@dataclass(frozen=True)
class Mistake:
    method: str
    does: object
    check: str
    said: str


def global_noise(self, model, rng, labels, how):
    codes, used = SAMPLE(self, model, rng, labels, how)
    return codes + 0.01 * torch.randn(codes.shape), used


def one_noise(self, model, rng, labels, how):
    labels = torch.zeros(rng.batch, dtype=torch.int64)
    return model.mean[labels] + torch.randn((1, 4, 4), generator=torch.Generator().manual_seed(0)), labels


def batch_statistics(self, model, rng, labels, how):
    codes, used = SAMPLE(self, model, rng, labels, how)
    return codes - codes.mean(0), used


def global_noise_in_loss(self, model, codes, labels, draws, how):
    return LOSS(self, model, codes, labels, {"noise": torch.randn(codes.shape)}, how)


def centred_loss(self, model, codes, labels, draws, how):
    found = LOSS(self, model, codes, labels, draws, how)
    return found - found.mean()


MISTAKES = {
    "unit interval": Mistake(
        "decode", lambda self, codes: codes.sigmoid(), "images", "must return [-1, 1], that is 2 x - 1"
    ),
    "bytes for pixels": Mistake(
        "decode",
        lambda self, codes: (codes + 1) * 127.5,
        "images",
        "the values span [",
    ),
    "no tuple": Mistake("sample", lambda *a: SAMPLE(*a)[0], "images", "line.sample must return (codes, labels)"),
    "not a number": Mistake("decode", lambda self, codes: codes.log(), "images", "NaN"),
    "global noise": Mistake("sample", global_noise, "same seed, same image", "draw all noise from `rng`"),
    "seeds ignored": Mistake("sample", one_noise, "same seed, same image", "the same image for different seeds"),
    "batch statistics": Mistake("sample", batch_statistics, "batch independence", "depends on the others of its batch"),
    "mean over the batch": Mistake("loss", lambda *a: LOSS(*a).mean(), "loss per image", "the loss of every image"),
    "global noise in the loss": Mistake(
        "loss", global_noise_in_loss, "loss per image", "every random number of a step comes from line.draw"
    ),
    "losses that mix": Mistake("loss", centred_loss, "loss per image", "depends on the others of its batch"),
    "loss of nothing": Mistake(
        "loss", lambda *a: LOSS(*a).detach().requires_grad_(), "gradients", "the loss does not depend on the network"
    ),
    "an error of its own": Mistake("loss", lambda *a: {}["missing"], "loss per image", "KeyError: 'missing' ("),
}


def checks(config, *options) -> tuple[int, dict[str, dict]]:
    done = invoke(main, "check", config, "--device", "cpu", *options)
    return done.exit_code, {one["name"]: one for one in last_object(done.stdout)["checks"]}


def test_a_family_that_keeps_the_contract_passes(line_config):
    code, found = checks(line_config)
    assert code == 0
    assert list(found) == [
        "files",
        "network",
        "images",
        "same seed, same image",
        "batch independence",
        "save and load",
        "loss per image",
        "gradients",
        "features",
    ]
    assert all(one["is_ok"] for one in found.values())
    assert found["images"]["text"].startswith("(1, 4, 4) each")


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_each_mistake_is_found_by_its_own_check(line_config, monkeypatch, mistake):
    monkeypatch.setattr(Line, mistake.method, mistake.does)
    code, found = checks(line_config)
    assert code == 1
    first = next(one for one in found.values() if not one["is_ok"])
    assert first["name"] == mistake.check
    assert mistake.said in first["text"]


def test_what_is_no_parameter_is_missed_after_loading(line_config, monkeypatch):
    """A plain attribute that counts how often networks were made: the loaded one is another."""
    made: list[Mean] = []

    def counted(self, *args, **options):
        FORWARD(self, *args, **options)
        made.append(self)
        self.shift = len(made)

    def shifted(self, model, rng, labels, how):
        codes, used = SAMPLE(self, model, rng, labels, how)
        return codes + 0.01 * model.shift, used

    monkeypatch.setattr(Mean, "__init__", counted)
    monkeypatch.setattr(Line, "sample", shifted)
    _, found = checks(line_config)
    assert not found["save and load"]["is_ok"]
    assert "neither a parameter, a buffer nor a constructor argument" in found["save and load"]["text"]


def test_all_missing_files_are_said_with_their_commands(line_config):
    line_config.with_name("base.safetensors").unlink()
    line_config.with_name("reference.npz").unlink()
    code, found = checks(
        line_config, "--set", "base.autoencoder=xar/pretrained/kl16.ckpt", "--set", "model.num_classes=3"
    )
    assert code == 1
    said = found["files"]["text"]
    assert said.startswith("3 missing:")
    assert "neon download kl16.ckpt" in said
    assert "neon fid ref --extractor tests.core.line_family:open_pixels --data IMAGES --out" in said
    assert found["network"]["is_ok"], "a fresh one of [model] is tried in its place"
    assert found["network"]["text"].endswith("(fresh, of [model])")


def test_images_of_another_size_than_the_data_are_said(line_config, tmp_path):
    import numpy as np

    np.savez(tmp_path / "data.npz", images=np.zeros((5, 1, 8, 8), np.uint8))
    _, found = checks(line_config, "--set", f"data.path={tmp_path / 'data.npz'}")
    assert "holds images (1, 8, 8), the model makes (1, 4, 4)" in found["data"]["text"]


def test_one_cause_is_said_once(line_config, monkeypatch):
    """Everything after the images needs them: their error stands at the first check that met it."""
    monkeypatch.setattr(Line, "sample", lambda *a: SAMPLE(*a)[0])
    _, found = checks(line_config)
    texts = {name: one["text"] for name, one in found.items() if not one["is_ok"]}
    assert texts["images"].startswith("line.sample must return (codes, labels)")
    assert {text for name, text in texts.items() if name != "images"} == {"as for 'images'"}
    assert len(texts) > 3
