"""Kill a run again and again with SIGKILL and show that it still ends with the same bits as an unbroken one.

    python scripts/kill_and_resume.py configs/tiny_imm.toml --kills 20

Runs the config unbroken, then in a second folder with `--kills` kills at random moments (seeded; as many seconds apart as spread
them over the whole run), and compares the tables and the merged file. Both on the CPU with one thread, where sums have one order.
Prints one JSON object; exit code 1 if anything differs.
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
STARTUP_S = 4.0  # imports and reading the base: a kill within them tests nothing


def start(config: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "neon", "run", str(config), "--out", str(folder), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def finish(config: Path, folder: Path) -> dict:
    process = start(config, folder)
    out, _ = process.communicate()
    if process.returncode != 0:
        raise click.ClickException(f"neon run {config} --out {folder} ended with exit code {process.returncode}")
    return json.loads(out.splitlines()[-1])


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
        raise click.ClickException(f"{out} exists: its runs would be resumed instead of made; remove it or choose another --out")
    begun = time.perf_counter()
    unbroken = finish(config, out / "unbroken")
    work_s = max(time.perf_counter() - begun - STARTUP_S, 1.0)
    moments = random.Random(seed)
    stages = []
    for _ in range(kills):
        process = start(config, out / "killed")
        try:
            process.wait(STARTUP_S + moments.uniform(0, 2 * work_s / kills))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        stages.append({"files": sum(len(names) for _, _, names in os.walk(out / "killed")), "exit_code": process.returncode})
        click.echo(json.dumps(stages[-1]), err=True)
    resumed = finish(config, out / "killed")
    same_table = without_times(resumed) == without_times(unbroken)
    same_file = (out / "unbroken/neon.safetensors").read_bytes() == (out / "killed/neon.safetensors").read_bytes()
    killed = sum(stage["exit_code"] == -signal.SIGKILL for stage in stages)
    print(json.dumps({"kills": killed, "same_table": same_table, "same_merged_file": same_file, "unbroken_s": work_s, "stages": stages}))
    sys.exit(0 if same_table and same_file and killed else 1)


if __name__ == "__main__":
    main()
