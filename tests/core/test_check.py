"""`neon check`: a family that keeps the contract passes; each way of breaking it fails at its own check, in a sentence
that says what to do."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

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
    "no tuple": Mistake("sample", lambda *a: SAMPLE(*a)[0], "images", "Line.sample must return (codes, labels)"),
    "not a number": Mistake("decode", lambda self, codes: codes.log(), "images", "NaN"),
    "global noise": Mistake("sample", global_noise, "same seed, same image", "draw all noise from `rng`"),
    "seeds ignored": Mistake("sample", one_noise, "same seed, same image", "the same image for different seeds"),
    "batch statistics": Mistake("sample", batch_statistics, "batch independence", "depends on the others of its batch"),
    "mean over the batch": Mistake("loss", lambda *a: LOSS(*a).mean(), "loss per image", "the loss of every image"),
    "global noise in the loss": Mistake(
        "loss", global_noise_in_loss, "loss per image", "every random number of a step comes from Line.draw"
    ),
    "losses that mix": Mistake("loss", centred_loss, "loss per image", "depends on the others of its batch"),
    "loss of nothing": Mistake(
        "loss",
        lambda *a: LOSS(*a).detach().requires_grad_(),
        "gradients",
        "does not depend on the model's parameters",
    ),
    "a loss without a graph": Mistake(
        "loss", lambda *a: LOSS(*a).detach(), "gradients", "the loss of Line.loss does not depend on the model's param"
    ),
    "no channels": Mistake("decode", lambda self, codes: codes[:, 0], "images", "is missing: return x[:, None]"),
    "the batch in the shape of noise": Mistake(
        "sample", lambda self, m, rng, labels, how: (rng.normal((4, 1, 4, 4)), labels), "images", "shape of one image"
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
        "sections",
        "references",
        "network",
        "guidance",
        "images",
        "same seed, same image",
        "batch independence",
        "save and load",
        "every guidance",
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
    np.savez(tmp_path / "data.npz", images=np.zeros((5, 1, 8, 8), np.uint8))
    _, found = checks(line_config, "--set", f"data.path={tmp_path / 'data.npz'}")
    assert found["data"]["text"] == "5 images (1, 8, 8), 0 classes"
    assert "holds images (1, 8, 8), the model makes (1, 4, 4)" in found["model and data"]["text"]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"labels": np.arange(40) % 4}, "labels up to 3, but the model has 3 classes"),
        ({}, "the model is class-conditional (3 classes) and the images have no labels"),
    ],
    ids=["too many classes", "no labels"],
)
def test_labels_that_are_not_those_of_the_model_are_said_by_all_that_reads_data(line_config, tmp_path, labels, said):
    """`neon diagnose` ended in an IndexError of the loss."""
    np.savez(tmp_path / "data.npz", images=np.zeros((40, 1, 4, 4), np.uint8), **labels)
    line_config.write_text(f"{line_config.read_text()}[model]\n[train]\nimages = 10\nbatch = 10\nlr = 1e-3\n")
    named = ("--set", f"data.path={tmp_path / 'data.npz'}", "--set", "finetune.batch=10")
    assert checks(line_config, *named)[1]["model and data"]["text"] == f"{tmp_path / 'data.npz'}: {said}"
    for verb in ("train", "diagnose"):
        done = invoke(main, verb, line_config, "--out", tmp_path / verb, "--device", "cpu", *named)
        assert done.exit_code == 1
        assert done.stderr.strip().endswith(f"Error: {tmp_path / 'data.npz'}: {said}")


def test_what_costs_nothing_is_said_before_the_network_is_made(line_config, tmp_path, monkeypatch):
    """And what is missing is said once."""

    def slow(*arguments):
        raise AssertionError("the network is made")

    monkeypatch.setattr(Mean, "__init__", slow)
    (tmp_path / "reference.npz").unlink()
    line_config.write_text(re.sub(r"\[synth\]\n(.+\n)*?(?=\[)", "", line_config.read_text()))
    (tmp_path / "data.npz").write_bytes(b"no archive")
    done = invoke(main, "check", line_config, "--device", "cpu", "--set", f"data.path={tmp_path / 'data.npz'}")
    lines = re.split(r"\n(?=ok|warn|FAIL)", done.stderr)
    assert [line.partition(":")[0] for line in lines] == [
        "FAIL  files", "FAIL  sections", "FAIL  data", "FAIL  network", "FAIL  not tried", "FAIL  not tried"
    ]  # fmt: skip
    assert "there is no [synth], which" in lines[1]
    assert str(tmp_path / "data.npz") in lines[2]
    assert done.stderr.count("reference.npz  (") == 1
    assert "1 check that needs 'files': references" in lines[4]
    (tmp_path / "data.npz").unlink()
    done = invoke(main, "check", line_config, "--device", "cpu", "--set", f"data.path={tmp_path / 'data.npz'}")
    assert "FAIL  files: 2 missing:" in done.stderr
    assert done.stderr.count("data.npz") == 1
    assert "2 checks that need 'files': data; references" in done.stderr


def test_one_cause_is_said_once(line_config, monkeypatch):
    """Everything after the images needs them: their error stands at the first check that met it."""
    monkeypatch.setattr(Line, "sample", lambda *a: SAMPLE(*a)[0])
    _, found = checks(line_config)
    texts = {name: one["text"] for name, one in found.items() if not one["is_ok"]}
    assert list(texts) == ["images", "not tried"]
    assert texts["images"].startswith("Line.sample must return (codes, labels)")
    assert texts["not tried"].startswith("7 checks that need 'images': same seed, same image; batch independence;")


def test_images_that_are_not_numbers_accuse_no_seed(line_config, monkeypatch):
    monkeypatch.setattr(Line, "decode", lambda self, codes: codes * float("nan"))
    _, found = checks(line_config)
    texts = {name: one["text"] for name, one in found.items() if not one["is_ok"]}
    assert list(texts) == ["images", "not tried"]
    assert texts["images"] == "the images hold NaN or infinities"
    done = invoke(main, "run", line_config, "--out", line_config.with_name("run"), "--device", "cpu")
    assert "images: the images hold NaN or infinities" in done.stderr


def test_without_a_network_the_others_are_counted(line_config):
    _, found = checks(line_config, "--set", "base.weights=raw")
    assert not found["network"]["is_ok"]
    assert found["not tried"]["text"].startswith("9 checks that need 'network': guidance; images;")


@pytest.mark.parametrize(
    ("section", "said"), [("base", "no [base], which [synth], [finetune]"), ("sampling", "no [sampling]")]
)
def test_a_stage_that_lacks_a_section_is_no_green_check(line_config, section, said):
    """[model] stands in for the base, and without [sampling] nothing needs images: all others would pass."""
    text = re.sub(rf"\[{section}\]\n(.+\n)*?(?=\[)", "", line_config.read_text())
    line_config.write_text(text + "[model]\n")
    code, found = checks(line_config)
    assert code == 1
    assert [name for name, one in found.items() if not one["is_ok"]] == ["sections"]
    assert said in found["sections"]["text"]


def test_what_only_trains_lacks_nothing_and_says_what_is_not_tried(line_config, tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros((5, 4, 4), np.uint8), labels=np.arange(5) % 3)
    line_config.write_text(
        'family = "tests.core.line_family:Line"\n[model]\n[data]\npath = "data.npz"\n'
        "[train]\nimages = 100\nbatch = 30\nlr = 1.0\n"
    )
    code, found = checks(line_config, "--set", f"data.path={tmp_path / 'data.npz'}")
    assert code == 0
    assert "train: 4 updates of 30; no [sampling]" in found["sections"]["text"]


@pytest.mark.parametrize(
    ("override", "check", "said"),
    [
        ("finetune.images=8", "sections", "finetune.images = 8 is less than one batch: a single update is made, on 16"),
        ("synth.num_images=12", "sections", "finetune.batch = 16 is more than the 12 images of [synth]"),
        ("select.num_images=16", "references", "select.num_images = 16 for the 16 features of"),
        ("report.num_images=10", "references", "report.num_images = 10 for the 16 features of"),
    ],
)
def test_what_is_hardly_meant_is_a_warning(line_config, override, check, said):
    done = invoke(main, "check", line_config, "--device", "cpu", "--set", override)
    assert done.exit_code == 0
    assert f"warn  {check}: {said}" in done.stderr
    cautions = [one for one in last_object(done.stdout)["checks"] if one["is_caution"]]
    assert [one["name"] for one in cautions] == [check]


def test_a_guidance_that_is_not_named_is_said_before_any_image(line_config):
    line_config.write_text(re.sub(r"(\[synth\]\n(.+\n)*?)cfg_scale.*\n", r"\1", line_config.read_text()))
    _, found = checks(line_config)
    assert found["sections"]["is_ok"]
    assert "synth.cfg_scale: this family is guided, name the scale" in found["guidance"]["text"]
    assert list(found).index("guidance") < list(found).index("images")


def test_batch_norms_are_named(line_config, monkeypatch):
    _, found = checks(line_config)
    assert "batch norm" not in found["loss per image"]["text"]
    build = Line.build

    def with_norms(self, arch):
        model = build(self, arch)
        model.norms = nn.ModuleList([nn.BatchNorm2d(1, affine=False, track_running_stats=False), nn.GroupNorm(1, 4)])
        return model

    monkeypatch.setattr(Line, "build", with_norms)
    monkeypatch.setattr(Line, "load", lambda self, checkpoint: self.build({}))
    _, found = checks(line_config)
    assert (
        "; 1 batch norm: training normalises by the images that a rank has at once" in found["loss per image"]["text"]
    )


def test_sixteen_features_and_seventeen_images_are_no_warning(line_config):
    _, found = checks(line_config, "--set", "select.num_images=17")
    assert not any(one["is_caution"] for one in found.values())


def test_a_run_of_one_update_makes_what_the_warning_says(line_config, tmp_path):
    options = ["--device", "cpu", "--out", tmp_path / "run", "--set", "finetune.images=8"]
    assert invoke(main, "finetune", line_config, *options).exit_code == 0
    (line,) = (tmp_path / "run/finetune/log.jsonl").read_text().splitlines()
    assert json.loads(line)["images"] == 16


def test_a_file_beside_the_config_is_named_where_it_is_not_in_the_working_folder(line_config, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = Path("..") / line_config.name
    for command in ("check", "run"):
        done = invoke(main, command, path, "--device", "cpu", "--set", "base.checkpoint=base.safetensors")
        assert done.exit_code == 1
        said = "did you mean ../base.safetensors? Paths are relative to the working folder: cd .."
        assert said in done.stderr
