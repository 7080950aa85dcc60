"""`neon run` on pipelines: every kind, full and low-rank; the result is a pipeline folder that diffusers loads."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from neon.adapters.lora import write_adapter
from neon.adapters.pipeline_folder import PipelineFolder
from neon.checkpoints import checkpoint
from neon.images.formats import open_images
from neon.pipeline.check import check
from neon.pipeline.diagnose import diagnose
from neon.pipeline.experiment import load
from neon.pipeline.publish import publish
from neon.pipeline.run import Run
from neon.quantize import to_uint8
from neon.runtime.distributed import World
from neon.search.points import Point
from neon.seeds import ImageRng
from tests.adapters.pipelines import PROMPTS, diffusers, flow_scheduler, saved
from tests.commands import ROOT, started
from tests.library.hub_server import TOKEN, Hub

CONFIG = """
family = "diffusers"
[base]
checkpoint = "{folder}/{kind}"
{prompts}
[sampling]
num_steps = 2
batch = 4
uint8 = "round"
[synth]
num_images = 6
{guidance}
[finetune]
images = 16
batch = 8
lr = 1e-3
[finetune.objective]
{objective}
[select]
strategy = "grid"
num_images = 4
first_seed = 1000
w = [1.0]
{guidances}
[report]
num_images = 4
first_seed = 2000
{guidance}
extractors = {{ "tests.adapters.mean:open_mean" = "{folder}/reference.npz" }}
num_shown = 4
"""


def config(folder, kind, noise=None, objective=""):
    saved(kind, folder, noise)
    np.savez(folder / "reference.npz", mu=np.array([0.4, 0.6]), sigma=np.eye(2) / 9)
    guidance = "" if kind == "unconditional" else "cfg_scale = 2.0"
    guidances = "" if kind == "unconditional" else "cfg_scale = [2.0]"
    prompts = f'prompts = "{folder}/prompts.txt"' if kind == "text" else ""
    file = folder / "config.toml"
    file.write_text(
        CONFIG.format(
            folder=folder, kind=kind, prompts=prompts, guidance=guidance, guidances=guidances, objective=objective
        )
    )
    return file


def tensors(path):
    return checkpoint.read(path, weights="any").tensors


def base_of(folder, kind):
    name = "transformer" if kind == "class" else "unet"
    return name, tensors(folder / kind / name / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("kind", ["unconditional", "class", "text"])
@pytest.mark.parametrize("objective", ["", "lora_rank = 2\nlora_alpha = 4.0"])
def test_a_whole_run_ends_with_a_pipeline_that_diffusers_loads(kind, objective, tmp_path):
    result = Run(load(config(tmp_path, kind, objective=objective)), tmp_path / "run", World()).all()
    name, base = base_of(tmp_path, kind)
    (snapshot,) = (tmp_path / "run/finetune").glob("snapshot-*.safetensors")
    synth, w = tensors(snapshot), result["w"]
    merged = tensors(tmp_path / "run/pipeline" / name / "diffusion_pytorch_model.safetensors")
    assert set(synth) == set(merged) == set(base)
    moved = [key for key in base if not torch.equal(synth[key], base[key])]
    if objective:
        assert moved
        assert all(key.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")) for key in moved)
    else:
        assert len(moved) > 0.8 * len(base)
    for key, value in base.items():  # the paper's line
        torch.testing.assert_close(merged[key], value - w * (synth[key] - value), rtol=0, atol=1e-6)

    published = publish(tmp_path / "run", tmp_path / "published")["files"]
    assert "model_index.json" in published
    assert any(file.startswith("adapter/") for file in published) == bool(objective and w)

    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline")
    pipeline.set_progress_bar_config(disable=True)
    generators = ImageRng(range(2000, 2004)).generators
    asked = {"batch_size": 4}
    if kind != "unconditional":
        for generator in generators:
            torch.randint(1000, (), generator=generator)
        classes = {"class_labels": [0, 1, 2, 3]}
        asked = {"guidance_scale": 2.0, **(classes if kind == "class" else {"prompt": [*PROMPTS, PROMPTS[0]]})}
    images = pipeline(**asked, generator=generators, num_inference_steps=2, output_type="pt").images
    (shown,) = [
        np.load(file)["images"]
        for line in map(json.loads, (tmp_path / "run/ledger.jsonl").read_text().splitlines())
        if line["block"]["first_seed"] == 2000
        and line["point"]["w"] == w
        and line["point"]["direction"] in ("synth", "none")
        for file in [tmp_path / "run/shown" / f"{line['key'][:16]}.npz"]
    ]
    difference = to_uint8(images * 2 - 1, "round").int() - torch.from_numpy(shown).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("kind", ["unconditional", "class", "text"])
def test_the_small_adapter_on_the_base_is_the_improved_pipeline(kind, tmp_path):
    """Applied by diffusers (text) or peft itself, to weights and to images."""
    peft = pytest.importorskip("peft")
    run = Run(load(config(tmp_path, kind, objective="lora_rank = 3\nlora_alpha = 4.0")), tmp_path / "run", World())
    (snapshot,) = run.finetune()
    run.write_merged(Point(w=1.5, snapshot=snapshot.stem.removeprefix("snapshot-")), "")
    name, base = base_of(tmp_path, kind)
    adapter = tmp_path / "run/adapter"
    assert sum(file.stat().st_size for file in adapter.iterdir()) < 0.5 * sum(4 * v.numel() for v in base.values())

    improved = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline")
    small = diffusers.DiffusionPipeline.from_pretrained(tmp_path / kind)
    if kind == "text":
        small.load_lora_weights(adapter)
        small.fuse_lora()
        small.unload_lora_weights()
    else:
        network = peft.PeftModel.from_pretrained(getattr(small, name), adapter)
        small.register_modules(**{name: network.merge_and_unload()})
    found, expected = getattr(small, name).state_dict(), getattr(improved, name).state_dict()
    assert found.keys() == expected.keys()
    moved = [key for key, value in base.items() if not torch.equal(value, expected[key])]
    assert moved
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-7)
    asked = {"unconditional": {"batch_size": 2}, "class": {"class_labels": [0, 1]}, "text": {"prompt": PROMPTS[:2]}}
    pictures = [
        pipe(
            **asked[kind], generator=ImageRng(range(2)).generators, num_inference_steps=3, output_type="pt"
        ).images.float()
        for pipe in (small, improved, diffusers.DiffusionPipeline.from_pretrained(tmp_path / kind))
    ]
    torch.testing.assert_close(pictures[0], pictures[1], rtol=0, atol=2e-5)
    assert (pictures[1] - pictures[2]).abs().max() > 5e-4  # the base's own


def test_the_safety_checker_of_a_base_is_kept_and_not_asked(tmp_path):
    """As every Stable Diffusion 1 has one: a class of diffusers' own pipelines, beside the networks."""
    file = config(tmp_path, "text")
    index = json.loads((tmp_path / "text/model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (tmp_path / "text/model_index.json").write_text(json.dumps(index))
    (tmp_path / "text/safety_checker").mkdir()
    (tmp_path / "text/safety_checker/model.safetensors").write_bytes(b"never read")
    run = Run(load(file), tmp_path / "run", World())
    (snapshot,) = run.finetune()
    run.write_merged(Point(w=1.5, snapshot=snapshot.stem.removeprefix("snapshot-")), "")
    assert (tmp_path / "run/pipeline/safety_checker/model.safetensors").read_bytes() == b"never read"
    assert json.loads((tmp_path / "run/pipeline/model_index.json").read_text()) == index


def test_an_update_of_a_higher_rank_is_refused(tmp_path):
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(6, 5), "b.weight": torch.randn(4)}
    weights = {**base, "a.weight": base["a.weight"] + 1e-3 * torch.randn(6, 2) @ torch.randn(2, 5)}
    write_adapter(tmp_path / "two", base, weights, 2, None)
    with pytest.raises(ValueError, match=r"the update of a\.weight is not of rank 1"):
        write_adapter(tmp_path / "one", base, weights, 1, None)
    write_adapter(tmp_path / "two", base, base, 1, None)
    assert not (tmp_path / "two").exists()  # there is nothing to apply


def test_flow_matching_runs_and_the_base_evaluates_as_its_own_pipeline(tmp_path):
    file = config(tmp_path, "unconditional", flow_scheduler())
    result = started("-m", "neon", "run", file, "--out", tmp_path / "run", "--device", "cpu")
    assert result["rows"].keys() >= {"base", "self-trained", "random direction", "neon"}
    settings = ("--checkpoint", tmp_path / "run/pipeline", "--device", "cpu")
    again = started("-m", "neon", "eval", file, *settings, "--out", tmp_path / "eval")
    assert again["value"] == result["value"]


def test_a_pipeline_on_the_hub_is_a_base_and_a_published_run_is_a_pipeline(tmp_path):
    """Against the stand-in of the Hub's API: the same number by name and by folder; pushed, it loads by its name."""
    file = config(tmp_path, "unconditional")
    Run(load(file), tmp_path / "run", World()).all()
    with Hub() as server:
        folder = tmp_path / "unconditional"
        inside = [path for path in folder.rglob("*") if path.is_file()]
        server.repos["me/base"] = {str(path.relative_to(folder)): path.read_bytes() for path in inside}
        settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment = {**os.environ, **settings, "HF_TOKEN": TOKEN}

        def neon(*arguments):
            words = [sys.executable, "-m", "neon", *map(str, arguments)]
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout.splitlines()[-1])

        named = ("--set", "base.checkpoint=hf://me/base", "--device", "cpu")
        by_name = neon("eval", file, *named, "--out", tmp_path / "a")
        by_folder = neon("eval", file, "--device", "cpu", "--out", tmp_path / "b")
        assert by_name["value"] == by_folder["value"]
        neon("publish", tmp_path / "run", "--push", "me/improved")
        code = "import diffusers; diffusers.utils.logging.disable_progress_bar(); "
        code += "p = diffusers.DiffusionPipeline.from_pretrained('me/improved'); "
        code += "print(p.unet.state_dict()['conv_in.bias'].double().sum().item())"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    merged = tensors(tmp_path / "run/pipeline/unet/diffusion_pytorch_model.safetensors")
    assert float(done.stdout.splitlines()[-1]) == merged["conv_in.bias"].double().sum().item()


def test_a_check_hashes_no_pipeline(tmp_path, monkeypatch):
    """Which has gigabytes; only what is kept of a run needs its hash."""
    file = config(tmp_path, "text")
    monkeypatch.setattr(PipelineFolder, "sha256", property(lambda folder: pytest.fail("hashed")))
    found = list(check(load(file), file, torch.device("cpu")))
    assert [one.text for one in found if not one.is_ok] == []


def test_labels_of_s_are_prompts(tmp_path):
    run = Run(load(config(tmp_path, "text")), tmp_path / "run", World())
    run.synth()
    images = open_images(tmp_path / "run/synth")
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert images.shape == (3, 16, 16)


def test_a_finished_run_repeats_nothing_and_another_prompt_is_another_run(tmp_path):
    file = config(tmp_path, "text", objective="lora_rank = 2")
    first = Run(load(file), tmp_path / "run", World()).all()
    ledger = (tmp_path / "run/ledger.jsonl").read_text()
    again = Run(load(file), tmp_path / "run", World()).all()
    assert (tmp_path / "run/ledger.jsonl").read_text() == ledger
    assert again["hashes"] == first["hashes"]
    (tmp_path / "prompts.txt").write_text("a red coat\n")
    with pytest.raises(ValueError, match="begun with another setting: base_sha256"):
        Run(load(file), tmp_path / "run", World()).all()


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        ("unconditional", "synth.cfg_scale=2.0", "guidance"),
        ("class", "synth.store=codes", "synth.store = 'images'"),
        ("class", f"base.autoencoder={__file__}", "a pipeline brings its own"),
        (
            "unconditional",
            "sampling.scheduler=Nothing",
            r"\[sampling\] scheduler: 'Nothing' is no SchedulerMixin",
        ),
        ("unconditional", "sampling.num_steps=0", "num_steps must be >= 1"),
        ("unconditional", "finetune.objective.lora_rank=-1", "lora_rank must be >= 0"),
        ("text", "finetune.objective.label_drop=2.0", "label_drop must be in 0 .. 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(kind, setting, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Run(load(config(tmp_path, kind), [setting]), tmp_path / "run", World()).all()


def test_a_near_name_is_told_before_anything_is_loaded(tmp_path):
    file = config(tmp_path, "unconditional")
    for wrong, near in (("DDIMSchedular", "DDIMScheduler"), ("eulerdiscretescheduler", "EulerDiscreteScheduler")):
        with pytest.raises(ValueError, match=rf"'{wrong}' is no SchedulerMixin class .* \(did you mean '{near}'\?\)"):
            load(file, [f"sampling.scheduler={wrong}"])
    with pytest.raises(ValueError, match=r"'UNet2DModel' is no SchedulerMixin class of diffusers$"):
        load(file, ["sampling.scheduler=UNet2DModel"])


def test_a_diagnosis_of_a_low_rank_fine_tune_is_of_its_matrices(tmp_path, monkeypatch):
    """The other weights do not move; and after the fine-tune, whose snapshots hold no matrices, it can be asked too."""
    file = config(tmp_path, "unconditional", objective="lora_rank = 2")
    np.savez(tmp_path / "real.npz", images=np.random.default_rng(0).integers(0, 256, (8, 16, 16), dtype=np.uint8))
    overrides = [f'data.path="{tmp_path}/real.npz"', "synth.num_images=8", "finetune.batch=2", "finetune.images=4"]
    run, names = Run(load(file, overrides), tmp_path / "run", World()), []
    with monkeypatch.context() as patch:
        patch.setattr("neon.pipeline.diagnose.fine_tune_length", lambda *given: names.extend(given[-1]) or 1.0)
        diagnose(run, 8)
    assert names
    assert all(".lora_" in name for name in names)
    before = diagnose(run, 8)
    run.finetune()
    assert diagnose(run, 8) == before


@pytest.mark.skipif(find_spec("torchsde") is not None, reason="torchsde is installed, so diffusers has the scheduler")
def test_a_package_that_a_class_of_diffusers_needs_is_named(tmp_path):
    """diffusers has a stand-in of that name; it was said to be no scheduler."""
    message = "DPMSolverSDEScheduler requires the torchsde library .*`pip install torchsde`"
    file = config(tmp_path, "unconditional")
    with pytest.raises(ValueError, match=rf"^.*\[sampling\] scheduler: {message}$"):
        load(file, ["sampling.scheduler=DPMSolverSDEScheduler"])
    index = tmp_path / "unconditional/model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "DPMSolverSDEScheduler"))
    with pytest.raises(ValueError, match=rf"^{index}: scheduler: {message}$"):
        Run(load(file), tmp_path / "run", World()).synth()
