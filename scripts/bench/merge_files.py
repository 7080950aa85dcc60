"""Time `neon merge` on sharded bfloat16 folders beside cp plus sync of the same bytes on the same disk.

\b
    python scripts/bench/merge_files.py --gigabytes 4 --folder /tmp/merge --out results/bench/merge_files_cpu.json

BASE is a LlamaForCausalLM of Llama 7B's width and as many layers as fit, saved by transformers in shards of 1 GB;
SYNTH is BASE plus noise. Every round copies the base (cp, then fsync of every file) and merges without and with SHA-256
of both inputs and the output; the best of all rounds counts. `peak_mib_above_imports` is resident memory above what it
was once torch was imported. With --mergekit PYTHON (an environment that has it) its task_arithmetic then does the same
merge once in float32, as we do, and once in bfloat16, its faster and coarser way. About 10 s per gigabyte and round.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import click
import safetensors.torch
import torch
from measuring import about, peak_mib, publish, reset_peak

from neon.checkpoints import checkpoint
from neon.merge_files.merging import merge
from neon.merge_files.pairing import Request

LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000, "num_attention_heads": 32}


def save_base(folder: Path, gigabytes: float) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def config(layers: int) -> LlamaConfig:
        return LlamaConfig(**LLAMA, num_hidden_layers=layers, dtype="bfloat16")

    with torch.device("meta"):
        bare, one = (LlamaForCausalLM(config(layers)).num_parameters() for layers in (0, 1))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    layers = max(1, round((gigabytes * 1e9 / 2 - bare) / (one - bare)))
    LlamaForCausalLM(config(layers)).save_pretrained(folder, max_shard_size="1GB")


def save_synth(folder: Path, base: Path) -> None:
    """The base with every number moved by noise of a fiftieth of its initial deviation (0.02)."""
    folder.mkdir()
    g = torch.Generator().manual_seed(1)
    for path in sorted(base.iterdir()):
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
            for tensor in tensors.values():
                for piece in tensor.flatten().split(1 << 24):
                    piece.copy_(piece.float() + 4e-4 * torch.randn(piece.shape, generator=g, dtype=torch.float32))
            safetensors.torch.save_file(tensors, folder / path.name, metadata={"format": "pt"})
        else:
            shutil.copy(path, folder)


def in_a_process(action: Callable[[], object]) -> None:
    """The models that are made must not count as memory of the merge."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("the models could not be made")


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


def processor_seconds() -> float:
    """Of this process and the ones it started: what a busy machine changes less than the wall's."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def differences(base: Path, ours: Path, theirs: Path) -> dict[str, float]:
    """Between two merges in bfloat16: the share of numbers that differ, and the largest difference in units of the last
    place, of the result or of the base where that is larger (where the two terms cancel, what is left has none)."""
    b, one, two = (checkpoint.read(folder, weights="auto").tensors for folder in (base, ours, theirs))
    count, differing, largest = 0, 0, 0.0
    for name in one:
        pieces = (tensors[name].flatten().split(1 << 22) for tensors in (b, one, two))
        for start, x, y in zip(*pieces, strict=True):
            size = torch.maximum(start.float().abs(), torch.maximum(x.float().abs(), y.float().abs()))
            _, exponent = torch.frexp(size)
            units = torch.ldexp((x.float() - y.float()).abs(), 8 - exponent)  # 8 bits of significand
            count, differing = count + x.numel(), differing + int((x != y).sum())
            largest = max(largest, units.max().item())
    return {"share_of_numbers": differing / count, "largest_in_last_places": largest}


def task_arithmetic(python: str, dtype: str, base: Path, synth: Path, out: Path, w: float) -> None:
    """mergekit's way to base - w (synth - base): a task vector of weight -w."""
    config = out.with_name("task.yaml")
    config.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n  - model: {synth}\n    parameters:\n"
        f"      weight: {-w}\nparameters:\n  normalize: false\ndtype: {dtype}\nout_dtype: bfloat16\n"
    )
    command = [python, "-m", "mergekit.scripts.run_yaml", str(config), str(out), "--no-copy-tokenizer"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    if done.returncode:
        raise click.ClickException(f"mergekit: {done.stderr[-2000:]}")


@click.command(help=__doc__)
@click.option("--gigabytes", default=4.0, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="On the disk to measure.")
@click.option("--mergekit", help="A Python that has mergekit.")
@click.option("--out", type=click.Path(path_type=Path))
def main(gigabytes: float, rounds: int, folder: Path, mergekit: str | None, out: Path | None) -> None:
    cpu = torch.device("cpu")
    result = about(cpu)
    w = 1.2

    base, synth = folder / "base", folder / "synth"
    folder.mkdir(parents=True, exist_ok=True)
    if not base.is_dir():
        in_a_process(lambda: save_base(base, gigabytes))
    if not synth.is_dir():
        in_a_process(lambda: save_synth(synth, base))
    target, copy, other = (folder / name for name in ("merged", "copy", "mergekit"))
    ways: dict[str, tuple[Callable[[], object], Path]] = {
        "cp": (lambda: copied(base, copy), copy),
        "merge": (lambda: merge(base, synth, target, Request(w=(w,), has_hashes=False)), target),
        "merge_with_hashes": (lambda: merge(base, synth, target, Request(w=(w,))), target),
    }
    reset_peak(cpu)
    resident = peak_mib(cpu)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (way, written) in ways.items():
            before = processor_seconds()
            seconds[name].append(timed(way, written))
            processor[name].append(processor_seconds() - before)
            if written == copy:
                shutil.rmtree(copy)
    peak = peak_mib(cpu)
    best = {name: min(values) for name, values in seconds.items()}
    result |= {
        "bytes": sum(path.stat().st_size for path in base.iterdir()),
        "seconds": seconds,
        "processor_seconds": processor,
        "share_of_cp": {name: best["cp"] / best[name] for name in ("merge", "merge_with_hashes")},
        "peak_mib_above_imports": peak - resident,
    }
    for dtype in ("float32", "bfloat16") if mergekit else ():
        taken = timed(lambda dtype=dtype: task_arithmetic(mergekit, dtype, base, synth, other, w), other)
        result[f"mergekit_in_{dtype}"] = {
            "seconds": taken,
            "merge_is_times_as_fast": taken / best["merge"],
            "merge_with_hashes_is_times_as_fast": taken / best["merge_with_hashes"],
            "difference": differences(base, target, other),
        }
    publish(result, out)


if __name__ == "__main__":
    main()
