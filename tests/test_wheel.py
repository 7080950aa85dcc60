"""The wheel alone: built, installed without the repository, and docs/own_model.md done in an empty folder with it."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("neon", "edm", "var", "xar", "imm", "flow", "fid")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from what git tracks, or would track: build outputs that lie about are not taken."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    for name in names or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts]:
        if (ROOT / name).is_file() and not name.startswith(("tests/", "results/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(source / "dist"), str(source)], check=True, capture_output=True)
    (found,) = (source / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment that holds the wheel alone; its dependencies are lent by this one (no .pth file of which, so
    no editable installation, is followed)."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # else pip finds us installed
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, env=alone)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def run(installed: Path, command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{installed / 'bin'}:/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_the_wheel_holds_the_packages_that_the_readme_names_their_types_and_their_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert tops == set(PACKAGES)
    readme = (ROOT / "README.md").read_text()
    assert f"installs the packages {', '.join(f'`{name}`' for name in PACKAGES[:-1])} and `{PACKAGES[-1]}`" in readme
    assert {f"{name}/py.typed" for name in PACKAGES} <= names
    for folder, inside in (("configs", "neon/configs"), ("demo", "neon/demo")):
        here = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {f"{inside}/{path}" for path in here if "__pycache__" not in path.parts} <= names
    code = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert code <= names, "every module is in a package that pyproject.toml lists"


def commands() -> list[str]:
    """The first block of docs/own_model.md, without its comments."""
    block = re.search(r"```\n(neon example.*?)```", (ROOT / "docs/own_model.md").read_text(), re.S)[1]
    return [re.split(r"  +#", line)[0] for line in block.splitlines()]


def test_the_commands_of_own_model_work_in_an_empty_folder_as_printed(installed, tmp_path):
    done = run(installed, ["python", "-c", "import neon; print(neon.__file__)"], tmp_path)
    assert done.stdout.startswith(str(installed)), done.stderr
    cwd = tmp_path
    for line in commands():
        if line.startswith("cd "):
            cwd = cwd / line.removeprefix("cd ")
            continue
        done = run(installed, ["bash", "-c", line], cwd)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    result = json.loads((cwd / "runs/mine/result.json").read_text())
    assert result["metric"] == "fd200[pixel-pca64]"
    assert not result["comparable"]
    assert (cwd / "runs/mine/neon.safetensors").is_file()
    assert len(list((cwd / "samples").glob("*.png"))) == 64


def test_the_published_configs_are_found_in_the_wheel(installed, tmp_path):
    code = "from neon.published.shipped import shipped_folder as f; print(len(list(f('configs').glob('*.toml'))))"
    done = run(installed, ["python", "-c", code], tmp_path)
    assert done.stdout.strip() == str(len(list((ROOT / "configs").glob("*.toml")))), done.stderr
