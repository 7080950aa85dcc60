"""The demo: Neon end to end on a real model and real images, both shipped with the project.

\b
bash scripts/demo.sh                    # set up, then this script: about 6 minutes on 2 CPU cores
python scripts/demo.py --synth-seeds 3  # what made results/demo.json: three synthetic sets at 8 and 18 steps,
                                        # about 35 minutes
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fid.features import open_extractor  # noqa: E402
from fid.frechet import frechet_distance  # noqa: E402
from fid.metrics import metric_name  # noqa: E402
from fid.moments import Moments  # noqa: E402
from fid.reference import read_reference  # noqa: E402
from neon.pipeline.experiment import load  # noqa: E402
from neon.pipeline.run import Run  # noqa: E402
from neon.report.result import selection  # noqa: E402
from neon.runtime.distributed import world  # noqa: E402
from neon.search.points import Block  # noqa: E402
from scripts.bench.measuring import processor  # noqa: E402
from scripts.fashion_mnist import load_split  # noqa: E402

CONFIG = ROOT / "configs" / "demo.toml"
RESULTS = ROOT / "results" / "demo.json"
METRIC, SECOND = "fd2k[fashion-cnn]", "fd2k[pixel-pca64]"
CAVEATS = """What to keep in mind:
- These are Frechet distances on a small classifier's features (and on 64 pixel principal components), not FIDs: they
  can be compared with each other, not with published numbers.
- Metrics disagree on the best w: on pixels it is smaller than on the classifier's features. A moderate w is the better
default.
- At 8 steps much of the base's error is the solver's; the 18-step rows show what Neon adds to a well-solved base.
- Look at the pictures, not only at the numbers."""


def run_once(steps: int, seed: int, folder: Path) -> dict:
    """One complete `neon run` of the demo's config with another number of steps or another synthetic set."""
    overrides = [f"sampling.num_steps={steps}", f"synth.first_seed={seed * 10_000}", f"finetune.seed={seed}"]
    with world() as ranks:
        return Run(load(CONFIG, overrides), folder, ranks).all()


def table(rows: dict[str, dict], title: str) -> str:
    lines = [title, f"  {'':<18}{'w':>6}{METRIC:>22}{SECOND:>22}"]
    for name, row in rows.items():
        lines.append(f"  {name:<18}{row['w']:>6g}{row['metrics'][METRIC]:>22.3f}{row['metrics'][SECOND]:>22.3f}")
    return "\n".join(lines)


def grid_table(points: list[dict]) -> str:
    metrics = list(points[0]["metrics"])
    lines = ["Search for w, on the selection seeds", f"  {'':<18}{'w':>6}" + "".join(f"{m:>22}" for m in metrics)]
    for p in sorted(points, key=lambda p: (p["direction"], p["w"])):
        name = {"random": "random direction"}.get(
            p["direction"], "base" if p["w"] == 0 else "self-trained" if p["w"] == -1 else "neon"
        )
        lines.append(f"  {name:<18}{p['w']:>6g}" + "".join(f"{p['metrics'][m]:>22.3f}" for m in metrics))
    return "\n".join(lines)


def base_and_neon(steps: int, seed: int, folder: Path) -> dict:
    """Held-out base and Neon at another number of steps, with S, fine-tune and search of their own; the controls are
    left to `run_once`."""
    overrides = [f"synth.first_seed={seed * 10_000}", f"finetune.seed={seed}", "synth.num_images=500"]
    config = load(CONFIG, [f"sampling.num_steps={steps}", *overrides])
    with world() as ranks:
        run = Run(config, folder, ranks)
        run.finetune()
        choice = run.select()
        report = Block(
            labels="balanced", first_seed=config.report.first_seed, num_images=2_000, num_shown=config.report.num_shown
        )
        points = {"base": replace(choice.point, w=0.0), "neon": choice.point}
        rows = {name: run.ledger.score(point, report) for name, point in points.items()}
    return {
        "synth_seed": seed,
        "w": choice.point.w,
        "rows": {name: {"w": s.point.w, "metrics": s.metrics} for name, s in rows.items()},
        "select": selection(choice),
    }


def share_base_rows(first: Path, folder: Path) -> None:
    """The base scores the same whatever S is: hand the ledger of the first seed on."""
    if folder != first and not (folder / "ledger.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(first / "ledger.jsonl", folder)
        if (first / "shown").is_dir():
            shutil.copytree(first / "shown", folder / "shown", dirs_exist_ok=True)


def three_seeds(num_seeds: int, out: Path) -> dict:
    """Every seed of S at 8 and at 18 steps, with real-against-real beside them."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()  # now: by the end of the run there may be another
    runs: dict[str, list[dict]] = {"8": [], "18": []}
    for steps in (8, 18):
        for seed in range(num_seeds):
            folder = out / f"steps{steps}-seed{seed}"
            share_base_rows(out / f"steps{steps}-seed0", folder)
            if steps == 8:
                result = run_once(steps, seed, folder)
                found = {
                    "synth_seed": seed,
                    "w": result["w"],
                    "rows": result["rows"],
                    "select": result["select"],
                    "step": result["step"],
                }
            else:
                found = base_and_neon(steps, seed, folder)
            runs[str(steps)].append(found)
    # Seconds differ from run to run: without them a second run of the command writes the same numbers, bit for bit.
    for run in (*runs["8"], *runs["18"]):
        for row in (*run["rows"].values(), *run["select"]["points"]):
            row.pop("seconds", None)
    return {
        "command": f"python scripts/demo.py --synth-seeds {num_seeds}",
        "commit": commit,
        "machine": f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "real_against_real": real_against_real(),
        "steps": runs,
    }


def real_against_real() -> dict[str, float]:
    """The distance to the reference of 2,000 real images that no part of the demo was trained on: the floor. Fetches
    them with npm."""
    images = load_split()["classifier_test"][0][:2000]
    found = {}
    for name in ("fashion-cnn", "pixel-pca64"):
        extractor = open_extractor(name)
        moments = Moments(extractor.dim)
        moments.update(extractor(images).pool)
        reference = read_reference(ROOT / "demo" / f"reference_{name}.npz")
        found[metric_name("fd", 2000, name)] = frechet_distance(generated=moments.gaussian(), reference=reference)
    return found


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "runs" / "demo", help="Folder of the run.")
@click.option(
    "--synth-seeds",
    type=click.IntRange(min=1),
    help="Instead: run this many synthetic sets at 8 and 18 steps and write results/demo.json.",
)
def main(out: Path, synth_seeds: int | None) -> None:
    if synth_seeds is not None:
        found = three_seeds(synth_seeds, out.with_name("demo-seeds"))
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        click.echo(json.dumps({"out": str(RESULTS)}))
        return
    started = time.time()
    result = run_once(8, 0, out)
    committed = json.loads(RESULTS.read_text())
    at_18 = committed["steps"]["18"][0]["rows"]
    say = lambda text: click.echo(text + "\n", err=True)  # noqa: E731 - people read stderr, programs the JSON on stdout
    say(grid_table(result["select"]["points"]))
    say(f"The search: {result['select']['why']}.")
    say(table(result["rows"], "Held-out noise, 2,000 images, 8 steps (just computed)"))
    say(
        table(
            at_18,
            f"Held-out noise, 2,000 images, 18 steps (committed results/demo.json, commit {committed['commit'][:9]})",
        )
    )
    say(CAVEATS)
    say(result["verdict"])
    say(f"Page: {out / 'report.html'}   merged model: {out / 'neon.safetensors'}   ({time.time() - started:.0f} s)")
    click.echo(
        json.dumps(
            {key: result[key] for key in ("metric", "value", "base_value", "comparable", "reason", "w", "merged")}
        )
    )


if __name__ == "__main__":
    main()
