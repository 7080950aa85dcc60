"""The project's own files agree with each other."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from neon.cli import main
from neon.config import load

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
