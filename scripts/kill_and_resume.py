"""Kill a run again and again with SIGKILL and show that it still ends with the same bits as an unbroken one.

\b
    python scripts/kill_and_resume.py configs/tiny_imm.toml --kills 20

Runs the config unbroken, then in a second folder with `--kills` kills, and compares the tables and the merged file. The
moments are random (seeded): a point of progress, counted in files and lines of the run's logs, so that every stage gets
its share, and then a random delay. Both runs are on the CPU with one thread, where sums have one order. Prints one JSON
object; exit code 1 if anything differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]


def start(config: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "neon", "run", str(config), "--out", str(folder), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )


def finish(config: Path, folder: Path) -> dict:
    process = start(config, folder)
    process.communicate()
    if process.returncode != 0:
        raise click.ClickException(f"neon run {config} --out {folder} ended with exit code {process.returncode}")
    return json.loads((folder / "result.json").read_text())


def progress(folder: Path) -> int:
    """Files in a run's folder, and lines of its logs: of the fine-tune and of the points that were scored."""
    files = [Path(where) / name for where, _, names in os.walk(folder) for name in names if not name.endswith(".tmp")]
    logs = [file for file in files if file.suffix == ".jsonl"]
    return len(files) + sum(file.read_bytes().count(b"\n") for file in logs if file.exists())


def without_times(value: object) -> object:
    """A result without what two runs may differ in: durations and the name of the folder."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "merged")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@click.command(help=__doc__)
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.option("--kills", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/kill_and_resume"), show_default=True)
def main(config: Path, kills: int, seed: int, out: Path) -> None:
    if out.exists():
        raise click.ClickException(
            f"{out} exists: its runs would be resumed instead of made; remove it or choose another --out"
        )
    begun = time.perf_counter()
    unbroken = finish(config, out / "unbroken")
    unbroken_s = time.perf_counter() - begun
    total, random_moment = progress(out / "unbroken"), random.Random(seed)
    stages = []
    for target in sorted(random_moment.randrange(total - 3) for _ in range(kills)):
        process = start(config, out / "killed")
        while process.poll() is None and progress(out / "killed") < target:
            time.sleep(0.01)
        try:
            process.wait(random_moment.uniform(0, unbroken_s / kills))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        stages.append({"progress": progress(out / "killed"), "of": total, "exit_code": process.returncode})
        click.echo(json.dumps(stages[-1]), err=True)
    resumed = finish(config, out / "killed")
    same_table = without_times(resumed) == without_times(unbroken)
    same_file = (out / "unbroken/neon.safetensors").read_bytes() == (out / "killed/neon.safetensors").read_bytes()
    killed = sum(stage["exit_code"] == -signal.SIGKILL for stage in stages)
    print(
        json.dumps(
            {
                "kills": killed,
                "same_table": same_table,
                "same_merged_file": same_file,
                "unbroken_s": round(unbroken_s, 1),
                "stages": stages,
            }
        )
    )
    sys.exit(0 if same_table and same_file and killed else 1)


if __name__ == "__main__":
    main()
