"""sampling.speed: what compiled blocks change, and that nothing stays behind."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from neon.config_table import to_plain
from neon.family import resolve
from neon.pipeline.experiment import parse
from neon.sampling.generate import Source, generate
from neon.sampling.options import Sampling

ROOT = Path(__file__).resolve().parents[2]
ARCH = {
    "class_name": "IMMPrecond",
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 10,
    "num_classes": 10,
    "model_type": "DiT",
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "temb_type": "stride",
}


def sampling(**keys: object) -> Sampling:
    return parse({"family": "imm", "sampling": {"uint8": "round", "num_steps": 2, **keys}}).need("sampling", Sampling)


def test_a_speed_left_at_its_default_is_no_part_of_what_a_run_depends_on():
    """Folders and ledgers begun before the key existed still fit."""
    assert "speed" in {field.name for field in fields(Sampling)}
    assert "speed" not in to_plain(sampling())
    assert to_plain(sampling(speed="compiled"))["speed"] == "compiled"


def test_fast_is_bfloat16_and_refuses_another_precision():
    assert sampling(speed="fast").arithmetic == "bf16"
    assert sampling(speed="compiled", precision="tf32").arithmetic == "tf32"
    with pytest.raises(ValueError, match=r"speed = 'fast' is bf16: leave precision away, got precision = 'tf32'"):
        sampling(speed="fast", precision="tf32")


def test_compiled_blocks_agree_to_rounding_and_leave_the_exact_mode_as_it_was():
    family = resolve("imm")
    torch.manual_seed(0)
    model = family.build(ARCH).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)

    def codes(how: Sampling) -> torch.Tensor:
        source = Source(family=family, sampling=how, labels="balanced", first_seed=0, num_classes=10)
        return next(generate(source, model, [range(4)], torch.device("cpu"))).codes

    exact = codes(sampling())
    compiled = codes(sampling(speed="compiled"))
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(codes(sampling()), exact)
    assert not torch.equal(compiled, exact)  # else nothing was compiled
    torch.testing.assert_close(compiled, exact, rtol=0, atol=1e-4 * exact.std().item())
    with torch.no_grad():  # weights move in place, as in the search for w
        next(model.parameters()).mul_(1.5)
    moved = codes(sampling())
    assert not torch.equal(moved, exact)
    torch.testing.assert_close(codes(sampling(speed="compiled")), moved, rtol=0, atol=1e-4 * moved.std().item())


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="a kernel without huge pages")
@pytest.mark.parametrize(
    ("module", "wanted"), [("neon.cli.main", True), ("var.calculate_fid", True), ("neon.library.improve", False)]
)
def test_a_command_asks_for_huge_pages_and_the_library_leaves_that_to_its_caller(module, wanted):
    """The kernel's own answer: the flags of the mapping in which a tensor of 64 MiB lies."""
    code = f"""
import {module}, re, torch
large = torch.empty(1 << 24)
maps = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", open("/proc/self/smaps").read(), re.M | re.S)
print(*(flags for start, end, flags in maps if int(start, 16) <= large.data_ptr() < int(end, 16)))
"""
    environ = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, check=True, capture_output=True, text=True
    )
    assert ("hg" in done.stdout.split()) == wanted


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, ROOT / "scripts" / "bench" / "gpu.py", "--device", "cpu", "--tiny", "--out", out]
    subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads(out.read_text())
    assert result["failed"] == {}
    assert result["dropped"] == []
    assert all(result["rows"][f"{name}/exact"]["equals_plain"] for name in ("edm", "var"))
    assert 1e-4 < result["rows"]["edm/fast"]["error"] < 0.1
    before = out.read_text()
    subprocess.run(command, cwd=ROOT, check=True)  # every row is there: nothing is measured again
    assert json.loads(out.read_text())["rows"] == json.loads(before)["rows"]
