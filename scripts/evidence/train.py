"""Train the base models of configs/small side by side on one GPU (or the CPU) within a time limit.

    python scripts/evidence/train.py --folder /tmp/small --seconds 330 --pack OUT

Each job measures its own speed first, with all others running, and sets the length of its recipe (images, warm-up,
decay) to what fits: the learning rate always comes down to 0. The lengths are in OUT's train.json. Models are written
in fp16 as FOLDER/JOB/model.safetensors; a job that is stopped all the same leaves its last snapshot.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from neon.checkpoints import checkpoint  # noqa: E402
from neon.pipeline.experiment import Autoencoder, load  # noqa: E402
from neon.store import files  # noqa: E402
from neon.training.recipe import Training  # noqa: E402
from scripts.evidence.jobs import CONFIGS, FAMILIES, JOBS, Job, autoencoder_path, model_path, neon  # noqa: E402

STEPS_TO_MEASURE = 200
MARGIN = 0.87
"""Share of the time left that a recipe is planned to fill, after its process has started."""


@dataclass
class Stage:
    """One training command of a job: where its settings stand, and what it leaves."""

    job: Job
    verb: str
    config: Path
    section: str
    recipe: Training
    overrides: tuple[str, ...]
    log: str
    """log.jsonl under the run's folder."""
    found: dict[str, object] = field(default_factory=dict)

    def command(self, out: Path, images: int) -> list[str]:
        scale = images / self.recipe.images
        sizes = {
            "images": images,
            "lr_ramp_images": min(self.recipe.lr_ramp_images, images // 10),
            "lr_cosine_images": round(self.recipe.lr_cosine_images * scale),
            "snapshot_images": max(images // 4, 1),
        }
        settings = [*self.overrides, *(f"{self.section}.{key}={value}" for key, value in sizes.items())]
        self.found = {
            "command": f"neon {self.verb} {self.config.relative_to(ROOT)} " + " ".join(f"--set {s}" for s in settings)
        }
        flags = [part for setting in settings for part in ("--set", setting)]
        return neon(self.verb, str(self.config), "--out", str(out), *flags)


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


def speed(stage: Stage, out: Path, log: Path, deadline: float, environment: dict[str, str]) -> tuple[float, float]:
    """(images per second, seconds until the first steps were made), measured on the recipe itself."""
    begun = time.time()
    process = start(stage.command(out, stage.recipe.images), log, environment)
    marks: list[tuple[float, int]] = []
    try:
        while time.time() < deadline and process.poll() is None:
            images = last_images(out / stage.log)
            if images > stage.recipe.batch and (not marks or images > marks[-1][1]):
                marks.append((time.time(), images))
            if len(marks) >= 2 and marks[-1][1] - marks[0][1] >= STEPS_TO_MEASURE * stage.recipe.batch:
                break
            time.sleep(0.02)
        if len(marks) < 2:
            raise RuntimeError(
                f"{stage.job.name}: {stage.verb} made no steps in {time.time() - begun:.0f} s; see {log}"
            )
    finally:
        stop(process)
    (t0, n0), (t1, n1) = marks[0], marks[-1]
    return (n1 - n0) / (t1 - t0), marks[0][0] - begun


def forget(log: Path) -> None:
    """Drop what the measured training left beside its log, so that the planned one begins anew."""
    for pattern in (log.name, "state.pt", "snapshot-*.safetensors"):
        for file in log.parent.glob(pattern):
            file.unlink()


def run_stage(stage: Stage, folder: Path, seconds: float, environment: dict[str, str]) -> Path:
    """Measure, plan, train; returns the last snapshot (EMA where there is one)."""
    deadline = time.time() + seconds
    name = stage.verb
    log = folder / "logs" / f"{stage.job.name}.log"
    out = folder / "runs" / stage.job.name
    rate, start_s = speed(stage, out, log, deadline, environment)
    forget(out / stage.log)
    left = deadline - time.time() - min(start_s, 12.0)  # what was encoded before the first step is kept
    images = max(int(rate * left * MARGIN) // stage.recipe.batch, 1) * stage.recipe.batch
    begun = time.time()
    print(f"[{stage.job.name}] {name}: {rate:,.0f} images/s, so {images:,} images in {left:.0f} s", flush=True)
    slack = (
        seconds / 2 if stage.verb == "train-autoencoder" else 15.0
    )  # without its last lines an autoencoder is of no use
    code = wait(start(stage.command(out, images), log, environment), deadline + slack)
    done = last_images(out / stage.log)
    stage.found |= {
        "images": images,
        "images_seen": done,
        "seconds": time.time() - begun,
        "images_per_second_alone": rate,
        "exit": code,
    }
    shots = sorted((out / stage.log).parent.glob("snapshot-*.safetensors"))
    print(f"[{stage.job.name}] {name}: exit {code}, {done:,} images, {time.time() - begun:.0f} s", flush=True)
    if not shots:
        raise RuntimeError(f"{stage.job.name}: {name} left no snapshot; see {log}")
    return shots[-1]


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


def train_job(job: Job, folder: Path, deadline: float, environment: dict[str, str], report: dict[str, object]) -> None:
    found: dict[str, object] = {}
    report[job.name] = found
    try:
        overrides = job.overrides
        target = autoencoder_path(folder, job)
        if target is not None:
            config = CONFIGS / f"{job.autoencoder}.toml"
            recipe = load(config, job.autoencoder_overrides).need("autoencoder", Autoencoder).train
            stage = Stage(
                job,
                "train-autoencoder",
                config,
                "autoencoder.train",
                recipe,
                job.autoencoder_overrides,
                "autoencoder/log.jsonl",
            )
            run_stage(stage, folder, job.autoencoder_share * (deadline - time.time()), environment)
            found["autoencoder"] = stage.found
            to_half(folder / "runs" / job.name / "autoencoder.safetensors", target)
            overrides = (*overrides, f"base.autoencoder={target}")
        recipe = load(job.config, job.overrides).need("train", Training)
        stage = Stage(job, "train", job.config, "train", recipe, overrides, "log.jsonl")
        shot = run_stage(stage, folder, deadline - time.time(), environment)
        found["model"] = stage.found
        to_half(shot, model_path(folder, job))
        found["bytes"] = model_path(folder, job).stat().st_size
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
        print(f"[{job.name}] FAILED: {found['error']}", flush=True)
        log = folder / "logs" / f"{job.name}.log"
        print("\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.is_file() else "", flush=True)


def pack(folder: Path, out: Path, report: dict[str, object]) -> None:
    """OUT/train.json: the report; OUT/train-{main,others}.tar.gz: models and logs of the families, of the rest."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, jobs in (("main", FAMILIES), ("others", tuple(set(JOBS) - set(FAMILIES)))):
        with (
            files.replacing(out / f"train-{name}.tar.gz") as stream,
            tarfile.open(fileobj=stream, mode="w:gz") as archive,
        ):
            for job in jobs:
                patterns = (
                    f"{job}/*.safetensors",
                    f"logs/{job}.log",
                    f"runs/{job}/log.jsonl",
                    f"runs/{job}/autoencoder/log.jsonl",
                )
                for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
                    archive.add(file, file.relative_to(folder))


@click.command(help=__doc__)
@click.option(
    "--folder", type=click.Path(path_type=Path), default=ROOT / "runs" / "small", help="Where everything is written."
)
@click.option("--seconds", type=float, default=6 * 3600.0, help="Time limit.")
@click.option("--jobs", default=",".join(JOBS), help=f"Comma-separated: {', '.join(JOBS)}.")
@click.option(
    "--pack", "out", type=click.Path(path_type=Path), help="Folder for the packed results, renewed every minute."
)
def main(folder: Path, seconds: float, jobs: str, out: Path | None) -> None:
    chosen = [JOBS[name] for name in jobs.split(",")]
    deadline = time.time() + seconds
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    report: dict[str, object] = {}
    folder.mkdir(parents=True, exist_ok=True)
    threads = [
        threading.Thread(target=train_job, args=(job, folder, deadline, environment, report), daemon=True)
        for job in chosen
    ]
    for thread in threads:
        thread.start()
    packed = time.time()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        if out is not None and time.time() - packed > 60:
            pack(folder, out, report)
            packed = time.time()
    if out is not None:
        pack(folder, out, report)
    failed = [name for name in FAMILIES if name in report and "error" in report[name]]  # type: ignore[operator]
    click.echo(json.dumps({"trained": sorted(set(report) - set(failed)), "failed": failed}))
    if len(failed) > 2:
        sys.exit(1)


if __name__ == "__main__":
    main()
