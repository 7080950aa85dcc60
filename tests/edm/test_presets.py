"""Published sizes, configs of the published rows, and the scripts that reproduce them."""

import itertools
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from edm.calculate_fid import main as calculate_fid
from edm.presets import MODELS, NUM_STEPS
from neon.pipeline.experiment import load
from tests import goldens

ROOT = Path(__file__).resolve().parents[2]
ROWS = {"edm_cifar10_cond": 10, "edm_cifar10_uncond": 0, "edm_ffhq64": 0}


def test_models_are_those_of_the_manifests():
    about = json.loads((goldens.MANIFESTS / "edm" / "_configs.json").read_text())
    expected = {name: {"class_name": entry["precond"], **entry["init_kwargs"]} for name, entry in about.items()}
    assert {name: dict(arch) for name, arch in MODELS.items()} == expected


@pytest.mark.parametrize("row", ROWS)
def test_config(row):
    experiment = load(ROOT / "configs" / f"{row}.toml")
    arch = MODELS[Path(experiment.base.checkpoint).stem]
    assert arch["label_dim"] == ROWS[row]
    assert experiment.sampling.options.num_steps == NUM_STEPS[arch["img_resolution"]]
    assert experiment.finetune.arch["dropout"] == arch["dropout"]
    blocks = [
        (part.first_seed, part.first_seed + part.num_images)
        for part in (experiment.synth, experiment.select, experiment.report)
    ]
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(blocks)), "seed blocks overlap"
    assert -1 not in experiment.select.w  # the endpoints are always there


@pytest.mark.parametrize("row", ROWS)
def test_reproduction_script(row, tmp_path, monkeypatch):
    """Run with a launcher that only writes down what it was asked: the commands are the published ones and parse."""
    log = tmp_path / "calls"
    for name in ("torchrun", "fetch"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "fetch")}
    subprocess.run(
        ["bash", str(ROOT / "scripts" / "reproduce" / f"{row}.sh"), "2"], env=environment, check=True, cwd=tmp_path
    )
    calls = log.read_text().splitlines()
    fetched = [call for call in calls if "neon.cli.download" in call]
    published, base, run = [call for call in calls if call.startswith("torchrun")]
    monkeypatch.chdir(tmp_path)
    experiment = load(ROOT / "configs" / f"{row}.toml")
    assert Path(experiment.base.checkpoint).name in fetched[0]
    for call, network in ((published, "checkpoints/Neon_EDM_"), (base, experiment.base.checkpoint)):
        launch, _, flags = call.partition(" edm/calculate_fid.py ")
        assert launch == "torchrun --standalone --nproc_per_node=2"
        for name in re.findall(r"\S+/\S+", flags):  # the command refuses files that are not there
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        options = calculate_fid.make_context("calculate_fid", flags.split()).params
        assert str(options["network_pkl"]).startswith(network)
        assert options["network_pkl"].name in fetched[0]
        assert str(options["ref"]) == experiment.report.extractors["inception-2015-12-05"]
        assert options["seeds"] == range(50_000)
        assert (options["max_batch_size"], options["num_steps"]) == (256, experiment.sampling.options.num_steps)
    assert re.fullmatch(rf"torchrun --standalone --nproc_per_node=2 -m neon run configs/{row}.toml", run)
