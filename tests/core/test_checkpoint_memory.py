"""Peak memory, measured in a process of its own: resident bytes above what was there before."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neon import checkpoint
from tests.core import pickles

NUM_TENSORS, TENSOR_MIB = 5, 40  # larger than what malloc keeps for reuse
MEASURE = """
import sys, re, torch
from pathlib import Path
from neon import checkpoint, merge

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

folder = Path(sys.argv[1])
torch.ones(1000).sum()
"""
MERGE = """
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
base, synth = (checkpoint.read(folder / f"{name}.safetensors") for name in ("base", "synth"))
checkpoint.write_streaming(folder / "out.safetensors", base.tensors, merge.merged_entries(base.tensors, synth.tensors, 1.5), metadata={})
print(status("VmHWM") - before)
"""
LOAD = """
model = torch.nn.Sequential(*(torch.nn.Linear(2048, 5120, bias=False) for _ in range(5)))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
checkpoint.read(folder / sys.argv[2]).load_into(model)
print(status("VmHWM") - before)
"""


def peak_mib(script: str, *args: object) -> float:
    done = subprocess.run([sys.executable, "-c", MEASURE + script, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def tensors(offset: float) -> dict[str, torch.Tensor]:
    return {f"{i}.weight": torch.full((5120, 2048), i + offset) for i in range(NUM_TENSORS)}


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is measured through /proc (Linux)")


@needs_proc
def test_a_merge_holds_three_tensors_not_two_models(tmp_path):
    checkpoint.write(tmp_path / "base.safetensors", tensors(0.0), metadata={})
    checkpoint.write(tmp_path / "synth.safetensors", tensors(0.5), metadata={})
    assert peak_mib(MERGE, tmp_path) < 3.3 * TENSOR_MIB  # base, synth, and the step that becomes the merged one
    merged = checkpoint.read(tmp_path / "out.safetensors").tensors
    assert [merged[f"{i}.weight"][0, 0].item() for i in range(3)] == [-0.75, 0.25, 1.25]


@needs_proc
@pytest.mark.parametrize("kind", ["a.safetensors", "a.pth", "a.pkl"])
def test_loading_takes_little_more_than_the_model_that_is_there(tmp_path, monkeypatch, kind):
    held = tensors(0.0)
    if kind == "a.pkl":
        model = torch.nn.Sequential(*(torch.nn.Linear(1, 1, bias=False) for _ in held))
        for layer, value in zip(model, held.values(), strict=True):
            layer.weight.data = value
        pickles.write(monkeypatch, tmp_path / kind, {"ema": pickles.persistent_module(model, "IMMPrecond", {})})
    elif kind == "a.pth":
        torch.save(held, tmp_path / kind)
    else:
        checkpoint.write(tmp_path / kind, held, metadata={})
    assert peak_mib(LOAD, tmp_path, kind) < 1.3 * TENSOR_MIB
