"""The project's own files agree with each other."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from neon.cli.main import main
from neon.pipeline.experiment import load
from neon.published.table import select

ROOT = Path(__file__).resolve().parents[2]


def test_environment_yml_lists_what_pyproject_does():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = re.findall(r"^ {6}- (\S+)$", (ROOT / "environment.yml").read_text(), re.M)
    assert listed == project["dependencies"]
    assert f"python{project['requires-python']}" in (ROOT / "environment.yml").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_config_is_valid_and_says_how_to_run_it(path):
    assert load(path).family_name
    head = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"configs/{path.name}" in head


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_dry_run_prints_the_plan_and_makes_nothing(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["run", str(path), "--set", "sampling.batch=3", "--dry-run"])
    assert done.exit_code == 0 or "[sampling]" in done.output  # a config that only trains has nothing to sample
    if done.exit_code == 0:
        assert json.loads(done.output)["sampling"]["batch"] == 3
    assert list(tmp_path.iterdir()) == []


def test_no_published_number_poses_as_ours():
    readme = (ROOT / "README.md").read_text()
    assert "published, not yet reproduced here" in readme


ROWS = [path for path in sorted((ROOT / "scripts/reproduce").glob("*.sh")) if not path.name.startswith("_")]


@pytest.mark.parametrize("script", ROWS, ids=lambda p: p.stem)
def test_a_reproduction_fetches_every_file_that_it_reads(script):
    text = script.read_text()
    (names,) = re.findall(r"^fetch (.*)", text, re.M)
    fetched = {str(item.target(Path())) for item in select(names.split(), ["refs"])}
    (config,) = re.findall(r"^run (configs/\w+\.toml)", text, re.M)
    read = text + (ROOT / config).read_text()
    read += "".join((ROOT / "configs" / name).read_text() for name in re.findall(r'based_on = "(.+)"', read))
    needed = set(re.findall(r"(?:checkpoints|fid_stats|xar/pretrained)/[\w./-]+\w", read))
    assert needed <= fetched
    assert needed


@pytest.mark.parametrize(
    ("row", "step", "message"),
    [
        ("edm_ffhq64", "train", "expected a number of GPUs, then published, base, run or all; got '2' 'train'"),
        ("flow_cifar10", "published", "this row has no 'published'"),
    ],
)
def test_a_step_that_a_row_lacks_is_said(row, step, message, tmp_path):
    command = ["bash", str(ROOT / "scripts/reproduce" / f"{row}.sh"), "2", step]
    done = subprocess.run(command, env={**os.environ, "PYTHON": "true"}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
