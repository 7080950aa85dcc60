"""The example of docs/own_model.md, run as it stands there: train a base, then the whole of Neon."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from neon.checkpoints import checkpoint

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "own_model.md").read_text()


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", DOC, re.S)[1]


def test_the_example_is_short():
    code = [line for line in block("python").split("class Mine")[1].splitlines() if line.strip()]
    assert len(code) <= 30


def test_the_example_runs_from_training_to_merged_file(tmp_path):
    (tmp_path / "mine.py").write_text(block("python"))
    (tmp_path / "mine.toml").write_text(block("toml"))
    (tmp_path / "demo").symlink_to(ROOT / "demo")

    def neon(*arguments: str) -> dict:
        command = [sys.executable, "-m", "neon", *arguments, "--device", "cpu"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

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
