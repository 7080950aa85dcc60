"""The example of docs/own_model.md, run as it stands there: train a base, then the whole of Neon."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from neon.checkpoints import checkpoint
from neon.cli.main import main
from tests.commands import invoke, last_object

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "own_model.md").read_text()


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", DOC, re.S)[1]


def test_the_example_is_short():
    code = [line for line in block("python").split("class Mine")[1].splitlines() if line.strip()]
    assert len(code) <= 30


def test_the_document_shows_the_files_that_neon_example_writes():
    for language, name in (("python", "mine.py"), ("toml", "mine.toml")):
        assert block(language) == (ROOT / "neon/example" / name).read_text()


def test_what_is_there_is_never_replaced(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first/mine.toml").write_text("mine")
    done = invoke(main, "example", "--out", tmp_path / "first")
    assert done.exit_code == 1
    assert "mine.toml is there already" in done.stderr
    assert [path.name for path in (tmp_path / "first").iterdir()] == ["mine.toml"]


def test_a_family_that_is_not_there_is_said_with_where_it_may_lie(tmp_path):
    (tmp_path / "mine.toml").write_text('family = "not_mine:Mine"')
    done = invoke(main, "check", tmp_path / "mine.toml")
    assert done.exit_code == 1
    assert "there is no module 'not_mine'" in done.stderr
    assert "in a file beside the config or on PYTHONPATH" in done.stderr


def test_the_example_runs_from_training_to_merged_file(tmp_path):
    """As installed, without PYTHONPATH for the config's folder: mine.py lies beside the config."""
    assert invoke(main, "example", "--out", tmp_path / "first").exit_code == 0
    tmp_path = tmp_path / "first"

    def neon(*arguments: str) -> dict:
        command = [sys.executable, "-m", "neon", *arguments, "--device", "cpu"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert neon("check", "mine.toml")["is_ok"]
    neon("train", "mine.toml", "--out", "runs/mine_base")
    result = neon("run", "mine.toml")
    assert result["metric"] == "fd200[pixel-pca64]"
    assert not result["comparable"]
    base = checkpoint.read(tmp_path / "runs/mine_base/model.safetensors", weights="raw")
    merged = checkpoint.read(tmp_path / result["merged"], weights="any")
    shot = checkpoint.read(next((tmp_path / "runs/mine/finetune").glob("snapshot-*.safetensors")), weights="any")
    for name in base.tensors:  # the file is the paper's line
        b, s = base.tensors[name], shot.tensors[name]
        torch.testing.assert_close(merged.tensors[name], b - result["w"] * (s - b), atol=1e-6, rtol=0)


TILES = """
import torch
from fid.features import Extractor, Features

class Tiles(Extractor):
    name, dim, sha256, comparable = "tiles_of_mine:open_tiles", 49, "0" * 64, "tile means"
    def extract(self, images):
        return Features(torch.nn.functional.avg_pool2d(images.float(), 4).flatten(1) / 255, None)

def open_tiles(*, path, device, allow_unknown_weights):
    return Tiles(device)
"""


def test_an_extractor_of_ones_own_lies_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiles_of_mine.py").write_text(TILES)
    arguments = ["--extractor", "tiles_of_mine:open_tiles", "--data", ROOT / "demo/fashion_base.npz", "--device", "cpu"]
    done = invoke(main, "fid", "ref", *arguments, "--out", "ref.npz")
    assert done.exit_code == 0, done.output
    assert last_object(done.stdout)["extractor"] == "tiles_of_mine:open_tiles"
