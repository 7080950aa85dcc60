"""Train the base models of configs/small side by side on one GPU (or the CPU) within a time limit.

\b
    python scripts/evidence/train.py --folder /tmp/small --seconds 330

Each job measures its own speed first, with all others running, and sets the length of its recipe (images, warm-up,
decay) to what fits: the learning rate always comes down to 0. The lengths are in FOLDER/train-JOB.json. Models are
written in fp16 as FOLDER/JOB/model.safetensors; a job that is stopped all the same leaves its last snapshot. An
autoencoder that lies in FOLDER/JOB is taken as it is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from neon.checkpoints import checkpoint  # noqa: E402
from neon.pipeline.experiment import load  # noqa: E402
from neon.store import records  # noqa: E402
from neon.training.recipe import Training  # noqa: E402
from scripts.evidence.jobs import CONFIGS, JOBS, Job, autoencoder_path, model_path, neon  # noqa: E402

STEPS_TO_MEASURE = 100
MARGIN = 0.9
"""Share of the time left that a recipe is planned to fill, after its process has started."""
LOG = "log.jsonl"


class Speed(NamedTuple):
    images_per_s: float
    start_s: float
    """Until the first steps were made."""


def planned(recipe: Training, images: int) -> list[str]:
    """The recipe's overrides that make it end after so many images."""
    sizes = {
        "images": images,
        "lr_ramp_images": min(recipe.lr_ramp_images, images // 10),
        "lr_cosine_images": round(recipe.lr_cosine_images * images / recipe.images),
        "snapshot_images": max(images // 4, 1),
    }
    return [f"train.{key}={value}" for key, value in sizes.items()]


def command(verb: str, config: Path, out: Path, overrides: Sequence[str]) -> list[str]:
    return neon(verb, str(config), "--out", str(out), *(part for setting in overrides for part in ("--set", setting)))


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(process: subprocess.Popen, deadline: float) -> int | None:
    """The exit code, or None if the deadline came first: the process is stopped then."""
    try:
        return process.wait(max(deadline - time.time(), 0.1))
    except subprocess.TimeoutExpired:
        stop(process)
        return None


def last_images(log: Path) -> int:
    if not log.is_file():
        return 0
    lines = log.read_text().splitlines()
    return json.loads(lines[-1])["images"] if lines else 0


def speed(job: Job, overrides: Sequence[str], folder: Path, deadline: float, environment: dict[str, str]) -> Speed:
    """Measured on the recipe itself; the training that it begins is stopped and forgotten."""
    recipe = load(job.config, overrides).need("train", Training)
    out, log = folder / "runs" / job.name, folder / "logs" / f"{job.name}.log"
    begun = time.time()
    process = start(command("train", job.config, out, overrides), log, environment)
    marks: list[tuple[float, int]] = []
    try:
        while time.time() < deadline and process.poll() is None:
            images = last_images(out / LOG)
            if images > recipe.batch and (not marks or images > marks[-1][1]):
                marks.append((time.time(), images))
            if len(marks) >= 2 and marks[-1][1] - marks[0][1] >= STEPS_TO_MEASURE * recipe.batch:
                break
            time.sleep(0.02)
        if len(marks) < 2:
            raise RuntimeError(f"{job.name}: train made no steps in {time.time() - begun:.0f} s; see {log}")
    finally:
        stop(process)
    for pattern in (LOG, "state.pt", "snapshot-*.safetensors"):  # what was encoded before the first step is kept
        for file in out.glob(pattern):
            file.unlink()
    (t0, n0), (t1, n1) = marks[0], marks[-1]
    return Speed((n1 - n0) / (t1 - t0), marks[0][0] - begun)


def train_model(
    job: Job, overrides: Sequence[str], folder: Path, deadline: float, environment: dict[str, str]
) -> tuple[Path, dict[str, object]]:
    """Measure, plan, train; returns the last snapshot (EMA where there is one) and what was done."""
    recipe = load(job.config, overrides).need("train", Training)
    out, log = folder / "runs" / job.name, folder / "logs" / f"{job.name}.log"
    measured = speed(job, overrides, folder, deadline, environment)
    left = deadline - time.time() - min(measured.start_s, 12.0)
    images = max(int(measured.images_per_s * left * MARGIN) // recipe.batch, 1) * recipe.batch
    settings = [*overrides, *planned(recipe, images)]
    print(f"[{job.name}] {measured.images_per_s:,.0f} images/s, so {images:,} images in {left:.0f} s", flush=True)
    begun = time.time()
    code = wait(start(command("train", job.config, out, settings), log, environment), deadline + 15.0)
    shots = sorted(out.glob("snapshot-*.safetensors"))
    if not shots:
        raise RuntimeError(f"{job.name}: training left no snapshot; see {log}")
    seconds = time.time() - begun
    print(f"[{job.name}] exit {code}, {last_images(out / LOG):,} images, {seconds:.0f} s", flush=True)
    shown = " ".join(f"--set {setting}" for setting in settings).replace(str(folder), "demo/small")
    return shots[-1], {
        "command": f"neon train {job.config.relative_to(ROOT)} {shown}",
        "images": images,
        "images_seen": last_images(out / LOG),
        "seconds": seconds,
        "exit": code,
    }


def train_autoencoder(job: Job, target: Path, folder: Path, deadline: float, environment: dict[str, str]) -> None:
    """As its config says: it takes minutes, also on a CPU."""
    config = CONFIGS / f"{job.autoencoder}.toml"
    out, log = folder / "runs" / job.name, folder / "logs" / f"{job.name}.log"
    code = wait(start(command("train-autoencoder", config, out, ()), log, environment), deadline)
    if code != 0:
        raise RuntimeError(f"{job.name}: train-autoencoder ended with {code} (None: out of time); see {log}")
    to_half(out / "autoencoder.safetensors", target)


def to_half(source: Path, target: Path) -> None:
    """A checkpoint of ours with every float32 tensor in fp16, but for buffers that fp16 cannot hold exactly."""
    found = checkpoint.read(source, weights="any")
    tables = ("freqs",)  # xAR's rotary tables are compared with what they are derived from
    tensors = {
        name: value.half() if value.dtype == torch.float32 and not any(table in name for table in tables) else value
        for name, value in found.tensors.items()
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(target, tensors, metadata=found.meta)


def train_job(job: Job, folder: Path, deadline: float, environment: dict[str, str], failed: list[str]) -> None:
    """Autoencoder, if the job needs one and has none, and model; what was done goes to FOLDER/train-JOB.json."""
    found: dict[str, object] = {}
    try:
        overrides = job.overrides
        autoencoder = autoencoder_path(folder, job)
        if autoencoder is not None:
            if not autoencoder.is_file():
                train_autoencoder(job, autoencoder, folder, deadline, environment)
            overrides = (*overrides, f"base.autoencoder={autoencoder}")
        shot, found = train_model(job, overrides, folder, deadline, environment)
        to_half(shot, model_path(folder, job))
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
        failed.append(job.name)
        print(f"[{job.name}] FAILED: {found['error']}", flush=True)
        log = folder / "logs" / f"{job.name}.log"
        print("\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.is_file() else "", flush=True)
    records.write_json(found, folder / f"train-{job.name}.json")


@click.command(help=__doc__)
@click.option(
    "--folder", type=click.Path(path_type=Path), default=ROOT / "runs" / "small", help="Where everything is written."
)
@click.option("--seconds", type=float, default=6 * 3600.0, help="Time limit.")
@click.option("--jobs", default=",".join(JOBS), help=f"Comma-separated: {', '.join(JOBS)}.")
def main(folder: Path, seconds: float, jobs: str) -> None:
    chosen = [JOBS[name] for name in jobs.split(",")]
    deadline = time.time() + seconds
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    failed: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    threads = [
        threading.Thread(target=train_job, args=(job, folder, deadline, environment, failed), daemon=True)
        for job in chosen
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    click.echo(json.dumps({"trained": [job.name for job in chosen if job.name not in failed], "failed": failed}))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
