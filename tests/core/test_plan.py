"""--dry-run: what it announces is what the run then does; what it measures has a closed form; what is missing is said
at once, by the run too."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fid.reference import read_reference
from neon.cli.main import main
from neon.pipeline.experiment import load
from neon.pipeline.measure import _counting, _sampling, measure
from neon.pipeline.probe import Probe
from neon.published.hints import how_to_get
from tests.commands import ROOT, invoke, last_object, started
from tests.core.line_family import Line
from tests.core.test_gpu_without_one import FAMILIES, built, source_of, use_autoencoder
from tests.pretend_graphs import pretend_graphs


def planned(config, *options) -> dict:
    done = invoke(main, "run", config, "--device", "cpu", "--dry-run", "--json", *options)
    assert done.exit_code == 0, done.output
    return last_object(done.stdout)


def test_the_announced_images_are_those_that_a_run_samples(line_config, tmp_path, monkeypatch):
    """Counted where they are made, by the seeds of their block. (The first four of S are looked at before.)"""
    stages = {stage["name"]: stage["images"] for stage in planned(line_config)["stages"]}
    counted: Counter[str] = Counter()
    sample = Line.sample

    def counting(self, model, rng, labels, how):
        counted["synth" if rng.seeds[0] < 1000 else "select" if rng.seeds[0] < 2000 else "report"] += rng.batch
        return sample(self, model, rng, labels, how)

    monkeypatch.setattr(Line, "sample", counting)
    monkeypatch.setattr("neon.pipeline.run.check_first_images", lambda *arguments: None)
    done = invoke(main, "run", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert last_object(done.stdout)["w"] == 0, "so that Neon's row is the base's, which is not sampled again"
    counted["synth"] -= 2  # one image at each of two guidances, to learn how often the network is called for it
    assert counted == {"synth": stages["synth"], "select": stages["select"], "report": stages["report"] * 3 // 4}
    assert stages["finetune"] == 96


def test_calls_and_operations_of_a_network_of_linear_layers(tmp_path):
    """docs/own_model.md's network: 8 steps of three linear layers; training is three times the forward pass, less the
    gradient of the input, which nobody asks for."""
    width, steps = 16, 8
    (tmp_path / "plan_of_mine.py").write_text((ROOT / "neon/example/mine.py").read_text())
    (tmp_path / "mine.toml").write_text(
        f"""family = "plan_of_mine:Mine"
[model]
width = {width}
[base]
checkpoint = "nowhere/model.safetensors"
[sampling]
num_steps = {steps}
uint8 = "round"
batch = 4
[synth]
num_images = 10
[finetune]
images = 6
batch = 3
lr = 1e-3
"""
    )
    rates = measure(Probe(load(tmp_path / "mine.toml")), with_features=False)
    first, rest = 2 * 785 * width, 2 * (width * width + width * 784)
    assert rates.sampling.calls == steps
    assert rates.sampling.flop == steps * (first + rest)
    assert rates.training.flop == 2 * first + 3 * rest
    assert rates.image_bytes == 784
    assert rates.weights_bytes == 4 * (785 * width + width + width * width + width + width * 784 + 784)
    assert rates.features is None
    assert rates.peak_bytes is None


NETWORK_CALLS = {"edm": 2 * 3 - 1, "flow": 8, "imm": 4, "var": len((1, 2, 4, 7))}
"""Of one image: two per step of Heun's method but the last, one per step, one per scale."""


@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_gpu_the_calls_and_products_are_counted_that_graphs_replay(name, monkeypatch):
    """With an accelerator the third call of a shape is the last that the network makes itself."""

    def counted():
        family, model, config = built(name)
        use_autoencoder(family, name)
        probe = Probe(config)
        probe.family, probe.model, probe.source = family, model.eval(), source_of(family, model, config)
        cost = _sampling(probe)
        return cost.calls, cost.flop

    monkeypatch.setattr("neon.pipeline.measure._timed", lambda *_, **__: (1.0, 1))
    calls, flop = counted()
    with pretend_graphs():
        assert counted() == (calls, flop)
    assert calls == NETWORK_CALLS.get(name, calls)
    assert calls > 0


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_attention_is_counted_as_its_two_products(mode):
    heads, tokens, width = 3, 10, 8
    values = torch.randn(1, heads, tokens, width)
    with mode(), _counting() as flop:
        torch.nn.functional.scaled_dot_product_attention(values, values, values)
    assert flop.get_total_flops() == 2 * (2 * heads * tokens * tokens * width)


def test_seconds_are_shared_by_ranks(line_config):
    """Two ranks take half as long each; the rates themselves are measured, so only the arithmetic is compared."""
    alone = planned(line_config)
    assert alone["seconds"] == pytest.approx(sum(stage["seconds"] for stage in alone["stages"]))
    together = started("-m", "neon", "run", line_config, "--device", "cpu", "--dry-run", "--json", ranks=2)
    assert together["ranks"] == 2
    assert together["stages"][0]["images"] == alone["stages"][0]["images"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("my_pipelin/unet", "my_pipeline/unet"), ("my_pipelin/vae", "my_pipeline"), ("elsewhere/a", "")],
)
def test_a_wrong_folder_on_the_way_to_a_file_is_told_with_the_near_name(tmp_path, given, meant):
    (tmp_path / "my_pipeline/unet").mkdir(parents=True)
    (tmp_path / "myfile").touch()
    assert how_to_get(tmp_path / given) == (f"did you mean {tmp_path / meant}?" if meant else "")


def test_no_near_name_is_sought_in_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    """As the folders above those of other users are; what is said is that the file is not there."""

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert how_to_get(tmp_path / "theirs/base.safetensors") == ""


def test_a_link_to_nowhere_is_not_proposed_in_place_of_itself(tmp_path):
    (tmp_path / "base.safetensors").symlink_to(tmp_path / "moved.safetensors")
    assert how_to_get(tmp_path / "base.safetensors") == ""
    assert how_to_get(tmp_path / "base.safetensor") == ""


def test_a_run_and_its_dry_run_name_all_missing_files_at_once(line_config, tmp_path):
    (tmp_path / "base.safetensors").rename(tmp_path / "Base.safetensors")
    (tmp_path / "reference.npz").unlink()
    dry = invoke(main, "run", line_config, "--out", tmp_path / "run", "--dry-run")
    real = invoke(main, "run", line_config, "--out", tmp_path / "run")
    for done, said in ((dry, dry.stdout), (real, real.stderr)):
        assert done.exit_code == 1
        assert f"{tmp_path / 'base.safetensors'}  (base.checkpoint)" in said
        assert f"did you mean {tmp_path / 'Base.safetensors'}?" in said
        assert f"{tmp_path / 'reference.npz'}  (report.extractors" in said
        assert "neon fid ref --extractor tests.core.line_family:open_pixels --data IMAGES --out" in said
    assert "2 files are missing" in real.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["reference", "statistics.v2", "my reference.npz"])
def test_the_command_that_makes_a_missing_reference_makes_it(line_config, tmp_path, name):
    """`neon fid ref` writes names that end in .npz: for others its command was refused."""
    named = f'report.extractors={{"tests.core.line_family:open_pixels" = "{tmp_path / name}"}}'
    asked = ("run", line_config, "--dry-run", "--set", named)
    (tmp_path / "reference.npz").unlink()
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8))
    (command,) = re.findall(r"make it: neon (fid ref .*?)(?:, and name|$)", invoke(main, *asked).stdout, re.M)
    words = [str(tmp_path / "images.npz") if word == "IMAGES" else word for word in shlex.split(command)]
    done = invoke(main, *words)
    assert done.exit_code == 0, done.output
    made = Path(last_object(done.stdout)["out"])
    assert read_reference(made).count == 40
    if made != tmp_path / name:
        assert f"did you mean {made}?" in invoke(main, *asked).stdout


def test_synth_does_not_ask_for_what_only_the_report_reads(line_config, tmp_path):
    (tmp_path / "reference.npz").unlink()
    done = invoke(main, "synth", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 0, done.output


def test_json_belongs_to_the_dry_run(line_config):
    done = invoke(main, "run", line_config, "--json")
    assert done.exit_code == 2
    assert "--json belongs to --dry-run" in done.stderr


def test_a_measurement_leaves_the_model_as_it_was(line_config):
    probe = Probe(load(line_config))
    before = {name: value.clone() for name, value in probe.model.state_dict().items()}
    measure(probe, with_features=True)
    assert all(torch.equal(before[name], value) for name, value in probe.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in probe.model.parameters())


def test_the_text_says_time_memory_and_disk(line_config):
    done = invoke(main, "run", line_config, "--device", "cpu", "--dry-run")
    assert done.exit_code == 0, done.output
    words = done.stdout.split()
    assert {"synth", "finetune", "select", "report", "time", "memory", "disk"} <= set(words)
    assert "450" in words, "15 points of 30 images"
    with pytest.raises(json.JSONDecodeError):
        json.loads(done.stdout.splitlines()[-1])


def test_a_search_is_announced_with_its_budget_and_keeps_it(line_config, tmp_path, monkeypatch):
    options = ["--set", "select.strategy=search", "--set", "select.num_images=200", "--set", "report.cfg_scale=1.0"]
    options += ["--set", "select.cfg_scale=[1.0]", "--set", "report.first_seed=3000"]
    stages = {stage["name"]: stage["images"] for stage in planned(line_config, *options)["stages"]}
    values = 4 * 2 + 1  # w = 0, -1, 0.5, 1 of two snapshots, and the random direction
    assert stages["select"] >= values * 200 // 3
    seen: list[int] = []
    sample = Line.sample

    def counting(self, model, rng, labels, how):
        seen.append(rng.batch if 1000 <= rng.seeds[0] < 3000 else 0)
        return sample(self, model, rng, labels, how)

    monkeypatch.setattr(Line, "sample", counting)
    done = invoke(main, "select", line_config, "--out", tmp_path / "run", "--device", "cpu", *options)
    assert done.exit_code == 1, "no snapshots yet"
    done = invoke(main, "finetune", line_config, "--out", tmp_path / "run", "--device", "cpu", *options)
    assert done.exit_code == 0, done.output
    done = invoke(main, "select", line_config, "--out", tmp_path / "run", "--device", "cpu", *options)
    assert done.exit_code == 0, done.output
    assert 0 < sum(seen) <= stages["select"]
