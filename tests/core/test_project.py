"""The project's own files agree with each other."""

import json
import re
import shlex
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


@pytest.mark.parametrize("script", sorted((ROOT / "scripts/reproduce").glob("*.sh")), ids=lambda p: p.stem)
def test_a_reproduction_fetches_every_file_that_it_reads(script):
    text = script.read_text()
    for name, value in re.findall(r"^(\w+)=(\S+)$", text, re.M):
        text = text.replace(f"${name}", value)
    (line,) = re.findall(r"download_models\.sh (.*)", text)
    words = shlex.split(line)
    groups = [word.removeprefix("--") for word in words if not word.startswith("https://") and word.startswith("--")]
    fetched = {
        str(item.target(Path())) for item in select([word for word in words if not word.startswith("--")], groups)
    }
    read = text + "".join((ROOT / config).read_text() for config in re.findall(r"configs/\w+\.toml", text))
    needed = set(re.findall(r"(?:checkpoints|fid_stats|xar/pretrained)/[\w./-]+\w", read))
    assert needed <= fetched
    assert needed
