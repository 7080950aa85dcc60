"""Take over what scripts/evidence/on_gpu.sh left in a folder: models, measurements, pictures; then make the page.

\b
    python scripts/evidence/unpack.py FOLDER --given runs/given

Models of jobs that are no repeats go to demo/small, JSON and pictures to results/small, docs/results.md is made again.
--given: the models and autoencoders that the run was given.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from neon.store import files, records  # noqa: E402
from scripts.evidence.jobs import JOBS, Job, autoencoder_path, model_path  # noqa: E402

MOST_BYTES = 12 << 20
"""Of all weights that are shipped."""


def take(source: Path, target: Path) -> bool:
    if not source.is_file():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o644)
    return True


def take_models(job: Job, found: Path, demo: Path) -> int:
    """Model and autoencoder of a job into `demo`; returns their bytes. Raises ValueError if a measured model is not
    this one."""
    model, autoencoder = model_path(found, job), autoencoder_path(found, job)
    if not model.is_file():
        return 0
    measured = found / "out" / f"{job.name}.json"
    if measured.is_file() and records.read_json(measured)["base_sha256"] != files.sha256_of(model):
        raise ValueError(f"{measured} is about another model than {model}: take both from one run")
    targets = [model_path(demo, job)]
    take(model, targets[0])
    if autoencoder is not None:
        targets.append(autoencoder_path(demo, job))  # the job has one
        if not take(autoencoder, targets[1]):
            raise ValueError(f"{autoencoder}: missing, the model is of no use without it; is it in --given?")
    return sum(target.stat().st_size for target in targets)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--given", type=click.Path(path_type=Path), default=ROOT / "runs" / "given", show_default=True)
@click.option("--demo", type=click.Path(path_type=Path), default=ROOT / "demo" / "small", show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=ROOT / "results", show_default=True)
def main(folder: Path, given: Path, demo: Path, results: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        found = Path(temporary)
        if given.is_dir():
            shutil.copytree(given, found, dirs_exist_ok=True)
        for name in ("models", "results"):
            with tarfile.open(folder / f"{name}.tar.gz") as archive:
                archive.extractall(found, filter="data")
        total = sum(take_models(job, found, demo) for job in JOBS.values() if not job.is_repeat)
        if total > MOST_BYTES:
            raise ValueError(f"the weights take {total:,} bytes, at most {MOST_BYTES:,} are shipped")
        for file in sorted((found / "out").iterdir()):
            if file.suffix in (".json", ".png"):
                take(file, results / "small" / file.name)
        for file in sorted(found.glob("train-*.json")):
            take(file, results / "small" / file.name)
    click.echo(f"{total:,} bytes of weights in {demo}")
    subprocess.run([sys.executable, str(ROOT / "scripts" / "make_results.py"), "--results", str(results)], check=True)


if __name__ == "__main__":
    main()
