"""Time `neon merge` on sharded bfloat16 folders beside cp plus sync of the same bytes on the same disk.

    python scripts/bench/merge_files.py --gigabytes 4 --folder /tmp/merge --out results/bench/merge_files_cpu.json

Every round copies the base (cp, then fsync of every file), merges without and with SHA-256 of both inputs and the
output, and takes the share of cp's speed; the best of all rounds is printed, with the peak memory above what was
resident once torch was imported. With --mergekit PYTHON (an environment that has it) its task_arithmetic does the same
merge, and the results are compared in units of the last place. About 15 s per gigabyte and round.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import click
import safetensors.torch
import torch
from measuring import about, publish

from neon.checkpoints import checkpoint
from neon.merge_files.merging import merge
from neon.merge_files.pairing import Request

SHARDS = 4
SIDE = 4096


def model(folder: Path, gigabytes: float, step: float) -> Path:
    """A folder of `SHARDS` shards of square bfloat16 layers and an index, as transformers saves it."""
    if folder.is_dir():
        return folder
    folder.mkdir(parents=True)
    per_shard = max(1, round(gigabytes * 1e9 / (2 * SIDE * SIDE * SHARDS)))
    weight_map = {}
    layer = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    move = step * torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        tensors = {f"model.layers.{i}.mlp.up_proj.weight": (layer * (1 + i / 100) + move).bfloat16() for i in numbers}
        safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    return folder


def copied(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def timed(action: Callable[[], object], target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def largest_difference(a: Path, b: Path) -> int:
    """Of two folders of bfloat16 tensors, in units of the last place (their bits as ordered integers)."""

    def ordered(value: torch.Tensor) -> torch.Tensor:
        bits = value.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    one, two = (checkpoint.read(folder, weights="auto").tensors for folder in (a, b))
    return max(int((ordered(one[name]) - ordered(two[name])).abs().max()) for name in one)


def task_arithmetic(python: str, base: Path, synth: Path, out: Path, w: float) -> None:
    """mergekit's way to base - w (synth - base): a task vector of weight -w."""
    config = out.with_name("task.yaml")
    config.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n  - model: {synth}\n    parameters:\n"
        f"      weight: {-w}\nparameters:\n  normalize: false\ndtype: bfloat16\n"
    )
    command = [python, "-m", "mergekit.scripts.run_yaml", str(config), str(out), "--no-copy-tokenizer"]
    subprocess.run(command, check=True, capture_output=True)


@click.command(help=__doc__)
@click.option("--gigabytes", default=4.0, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="On the disk to measure.")
@click.option("--mergekit", help="A Python that has mergekit.")
@click.option("--out", type=click.Path(path_type=Path))
def main(gigabytes: float, rounds: int, folder: Path, mergekit: str | None, out: Path | None) -> None:
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = about(torch.device("cpu"))
    w = 1.2

    def make(name: str, step: float) -> Path:
        """In a process of its own: the models must not count as memory of the merge."""
        if not (folder / name).is_dir() and os.fork() == 0:
            model(folder / name, gigabytes, step)
            os._exit(0)
        return folder / name

    base, synth = make("base", 0.0), make("synth", 0.01)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    target, copy = folder / "merged", folder / "copy"
    seconds: dict[str, list[float]] = {"cp": [], "merge": [], "merge_with_hashes": []}
    for _ in range(rounds):
        seconds["cp"].append(timed(lambda: copied(base, copy), copy))
        request = Request(w=(w,), has_hashes=False)
        seconds["merge"].append(timed(lambda request=request: merge(base, synth, target, request), target))
        request = Request(w=(w,))
        seconds["merge_with_hashes"].append(timed(lambda request=request: merge(base, synth, target, request), target))
    best = {name: min(values) for name, values in seconds.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result |= {
        "bytes": sum(path.stat().st_size for path in base.iterdir()),
        "seconds": seconds,
        "share_of_cp": {name: best["cp"] / best[name] for name in ("merge", "merge_with_hashes")},
        "peak_mib_above_imports": peak - resident,
    }
    if mergekit is not None:
        other = folder / "mergekit"
        taken = timed(lambda: task_arithmetic(mergekit, base, synth, other, w), other)
        result["mergekit"] = {
            "seconds": taken,
            "times_slower": taken / best["merge_with_hashes"],
            "largest_difference_ulp": largest_difference(target, other),
        }
    publish(result, out)


if __name__ == "__main__":
    main()
