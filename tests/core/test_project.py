"""The project's own files agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest

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


def test_no_published_number_poses_as_ours():
    readme = (ROOT / "README.md").read_text()
    assert "published, not yet reproduced here" in readme
