"""The project's own files agree with each other."""

import ast
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import neon
from fid.inception import WEIGHTS
from neon.cli.main import main
from neon.pipeline.experiment import load
from neon.published.table import select

ROOT = Path(__file__).resolve().parents[2]


def test_environment_yml_lists_what_pyproject_does():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = re.findall(r"^ {6}- (\S+)$", (ROOT / "environment.yml").read_text(), re.M)
    assert listed == project["dependencies"]
    assert f"python{project['requires-python']}" in (ROOT / "environment.yml").read_text()


def test_the_oldest_supported_torch_and_python_are_tested():
    workflow, project = ((ROOT / name).read_text() for name in (".github/workflows/tests.yml", "pyproject.toml"))
    for package in ("torch", "torchvision"):
        oldest = re.search(rf'"{package}>=([\d.]+)"', project)
        assert f"{package}=={oldest[1]}.*" in workflow
    assert f'python: "{re.search(r"requires-python = .>=([0-9.]+)", project)[1]}"' in workflow


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_config_is_valid_and_says_how_to_run_it(path):
    if path.stem.startswith("diffusers_"):
        pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
    assert load(path).family_name
    head = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"configs/{path.name}" in head


PUBLISHED = [
    path for path in sorted((ROOT / "configs").glob("*.toml")) if "_imagenet" in path.stem or "_cifar10" in path.stem
]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_dry_run_names_every_missing_file_with_its_download_and_makes_nothing(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEON_CACHE", str(tmp_path / "cache"))
    done = CliRunner().invoke(main, ["run", str(path), "--set", "sampling.batch=3", "--dry-run", "--json"])
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert found["config"]["sampling"]["batch"] == 3
    config = load(path)
    named = [config.base.checkpoint, config.base.autoencoder, *config.report.extractors.values()]
    wanted = {name for name in named if name is not None} | {str(tmp_path / "cache" / WEIGHTS.files[0])}
    assert {one["path"] for one in found["missing"]} == wanted
    for one in found["missing"]:
        name = one["how"].removeprefix("neon download ")
        (item,) = select([name], [])
        # the table's cache folder is that of the process, which this test moved
        if item.name != WEIGHTS.files[0]:
            assert Path(one["path"]) == item.target(Path()), "the command puts it where the config reads it"
    assert list(tmp_path.iterdir()) == []


def test_no_published_number_poses_as_ours():
    readme = (ROOT / "README.md").read_text()
    assert "published, not yet reproduced here" in readme


ROWS = [path for path in sorted((ROOT / "scripts/reproduce").glob("*.sh")) if not path.name.startswith("_")]


@pytest.mark.parametrize("script", ROWS, ids=lambda p: p.stem)
def test_a_reproduction_fetches_every_file_that_it_reads(script):
    text = script.read_text()
    (names,) = re.findall(r"^fetch (.*)", text, re.M)
    fetched = {str(item.target(Path())) for item in select(names.split(), [])}
    (config,) = re.findall(r"^run (configs/\w+\.toml)", text, re.M)
    read = text + (ROOT / config).read_text()
    read += "".join((ROOT / "configs" / name).read_text() for name in re.findall(r'based_on = "(.+)"', read))
    needed = set(re.findall(r"(?:checkpoints|fid_stats|xar/pretrained)/[\w./-]+\w", read))
    assert needed == fetched, "what the row reads, and nothing else"


@pytest.mark.parametrize("script", ROWS, ids=lambda p: p.stem)
def test_help_of_a_reproduction_is_help(script, tmp_path):
    environment = {**os.environ, "PYTHON": "/nowhere"}  # a download would fail
    done = subprocess.run(["bash", script, "--help"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "published FID" in done.stdout
    assert f"usage: {script} [number of GPUs" in done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "scripts/reproduce/small").glob("[!_]*.sh")), ids=lambda p: p.stem)
def test_help_of_a_small_reproduction_is_help(script, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 99\n")  # making the data would fail
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for words, code in ((["--help"], 0), (["nothing"], 2)):
        done = subprocess.run(["bash", script, *words], env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code
        assert "[run | base | measure" in done.stdout + done.stderr


def test_the_skeleton_fetches_the_inception():
    (line,) = re.findall(r"^fetch\(\).*", (ROOT / "scripts/reproduce/_row.sh").read_text(), re.M)
    assert f"bash download_models.sh {WEIGHTS.files[0]} " in line


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


PAPERS = ("2510.03597", "2206.00364", "2404.02905", "2502.20388", "2503.07565", "2302.00482")


SCRIPTS = [path for path in sorted((ROOT / "scripts").rglob("*.py")) if "help=__doc__" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_help_of_a_script_shows_its_commands_as_they_are_written(path):
    """However narrow the terminal: click makes one paragraph of lines that no \\b precedes."""
    documented = ast.get_docstring(ast.parse(path.read_text()))
    command = click.Command(path.name, help=documented)
    shown = [line.strip() for line in command.get_help(click.Context(command, terminal_width=40)).splitlines()]
    examples = [line.strip() for line in documented.splitlines() if re.match(r"\s*(python|bash) scripts/", line)]
    assert examples
    assert [line for line in examples if line not in shown] == []


def test_the_papers_are_cited_and_thanked():
    """Neon's and those of the five families, in the citation file and in the README; every family names its paper."""
    citation, readme = (ROOT / "CITATION.cff").read_text(), (ROOT / "README.md").read_text()
    thanks = readme.split("## Acknowledgements")[1]
    for author in ("Alemohammad", "Wang", "Baraniuk"):
        assert f"family-names: {author}" in citation
        assert author in thanks
    for paper in PAPERS:
        assert f"https://arxiv.org/abs/{paper}" in citation
        assert f"https://arxiv.org/abs/{paper}" in thanks
    for name in ("edm", "var", "xar", "imm", "flow"):
        code = "".join(path.read_text() for path in (ROOT / name).glob("*.py"))
        assert any(paper in code for paper in PAPERS[1:])


def test_citation_and_changelog_are_of_this_version():
    assert f"\nversion: {neon.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    first = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first[1] == neon.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == neon.__version__


def test_issue_templates_ask_for_what_the_commands_print():
    texts = {path.stem: path.read_text() for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.md")}
    assert set(texts) == {"bug", "number"}
    assert all(text.startswith("---\nname: ") for text in texts.values())
