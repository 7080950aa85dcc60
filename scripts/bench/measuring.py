"""What all benchmarks measure in the same way, and what they say about the machine."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks measure this checkout, installed or not


def about(device: torch.device) -> dict[str, object]:
    """Machine, threads, load, versions and commit. Call it first: the load is that of the others."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")),
    }


def processor() -> str:
    """The model's name where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def seconds_of(action: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall time of the fastest of `repeats` calls: the others were disturbed."""
    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        action()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_of(action: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in one call (a multiply-add counts
    two)."""
    counter = FlopCounterMode(display=False)
    with counter:
        action()
    return counter.get_total_flops()


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """What this machine reaches in a large matrix product now: the yardstick for every share."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / seconds_of(lambda: a @ b, device, repeats=5)


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of peak memory; on Linux the process's own high-water mark is set back as well."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    """Peak since `reset_peak`. CUDA: tensors; CPU: the whole process, weights and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def publish(result: Mapping[str, object], out: Path | None) -> None:
    """Print the JSON, and write it to `out` if given."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
