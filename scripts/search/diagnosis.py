"""Does `neon diagnose` say the right sign of w? Where the best w is known: the toy, the small families, the demo.

\b
python scripts/search/study.py toy && python scripts/search/diagnosis.py toy
python scripts/make_small_data.py && python scripts/search/diagnosis.py small
bash scripts/demo.sh && python scripts/search/diagnosis.py loss

They write diagnose.json, diagnose_small.json and diagnose_loss.json of results/search. `small` runs `neon diagnose` as
it is, on held-out real images and as many synthetic ones (IMAGES), on one CPU core. It writes its rows one by one, and
those that are there already are not made again. `loss` follows the held-out loss along w in the demo's runs/demo.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from neon.checkpoints import checkpoint  # noqa: E402
from neon.images.formats import open_images  # noqa: E402
from neon.merge import LiveMerge  # noqa: E402
from neon.pipeline.diagnose import diagnose  # noqa: E402
from neon.pipeline.experiment import load  # noqa: E402
from neon.pipeline.run import Run  # noqa: E402
from neon.runtime.distributed import world  # noqa: E402
from neon.toy.experiment import Model  # noqa: E402
from neon.toy.gradients import gradient  # noqa: E402
from neon.toy.stack import Weights  # noqa: E402
from neon.toy.target import real_points  # noqa: E402
from neon.training.alignment import Gradients, align  # noqa: E402
from neon.training.loop import snapshots  # noqa: E402
from neon.training.recipe import Training  # noqa: E402
from neon.training.step_data import step_data  # noqa: E402
from scripts.evidence.jobs import FAMILIES, JOBS, base_overrides  # noqa: E402
from scripts.search.study import RESULTS, toy_replicas  # noqa: E402

NUM_POINTS, NUM_BATCHES = 32_000, 32
IMAGES = {"demo": 1_280, "edm": 1_280, "flow": 1_280, "var": 2_560, "imm": 640, "xar": 640}
"""Real ones, and synthetic ones, of every small model: some minutes of one core each."""
LOSS_WS, LOSS_IMAGES = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5), 2_048
HELD_OUT = ROOT / "data" / "fashion_test.npz"


def gradients(model: Model, base: Weights, points_1N2: Tensor, first_seed: int) -> Gradients:
    """Of batch k, with draws of its own."""
    batches = points_1N2.chunk(NUM_BATCHES, dim=1)

    def at(k: int, offset: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        weights = base if offset is None else {name: base[name] + offset[name] for name in base}
        return gradient(model, weights, batches[k], seed=first_seed + k)

    return at


def toy() -> None:
    truth = {(c["case"].rsplit(", block", 1)[0], c["seed"]): c for c in json.loads((RESULTS / "toy.json").read_text())}
    rows = []
    for name, model, knob, seed, base, _ in toy_replicas():
        real = real_points(1, NUM_POINTS, seed=7 + seed)
        noise = torch.randn(1, NUM_POINTS, 2, generator=torch.Generator().manual_seed(50 + seed))
        synthetic = model.sample(base, noise, knob)
        found = align(
            gradients(model, base, real, 0), gradients(model, base, synthetic, 1_000), NUM_BATCHES, alpha=lambda d: 1.0
        )
        dense = truth[name, seed]
        rows.append(
            {
                "case": name,
                "seed": seed,
                "sign": found.sign,
                "s": [found.low, found.s, found.high],
                "cosine": found.cosine,
                "best_w": dense["dense_place"][0],
                "base_value": dense["base_value"],
                "dense_value": dense["dense_value"],
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    (RESULTS / "diagnose.json").write_text(json.dumps(rows, indent=1) + "\n")


def small() -> None:
    path = RESULTS / "diagnose_small.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    for name, num_images in IMAGES.items():
        if not any(row["case"] == name for row in rows):
            rows.append(small_row(name, num_images))
            path.write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)


def small_row(name: str, num_images: int) -> dict[str, object]:
    """The config's own first synthetic images by the sampler that its best w was measured with."""
    config, overrides = ROOT / "configs" / f"{name}.toml", []
    if name in FAMILIES:
        config = JOBS[name].config
        sampler = json.loads((ROOT / "results" / "small" / f"{name}.json").read_text())["sampler"]
        overrides = [*base_overrides(ROOT / "demo" / "small", JOBS[name]), *sampler]
    overrides += [f"data.path={HELD_OUT}", f"synth.num_images={num_images}"]
    with world("cpu") as alone:
        found = diagnose(Run(load(config, overrides), ROOT / "runs" / "diagnosis" / name, alone), num_images)
    return {
        "case": name,
        "images": num_images,
        "sign": found["sign_of_w"],
        "s": [found["low"], found["s"], found["high"]],
        "cosine": found["cosine"],
        "predicted_w": found["best_w_by_loss"],
    }


def loss() -> None:
    """What the fine-tune's loss on held-out real images says of every w, the same draws for all: where the loss has its
    minimum along the step, and how far from the best w of the samples."""
    with world("cpu") as alone:
        run = Run(load(ROOT / "configs" / "demo.toml"), ROOT / "runs" / "demo", alone)
        recipe, images = run.config.need("finetune", Training), open_images(HELD_OUT)
        tuned = checkpoint.read(snapshots(run.folder / "finetune")[-1], weights="any").tensors
        live = LiveMerge(run.model, run.base_tensors, tuned)
        losses = {}
        for w in LOSS_WS:
            live.set_w(w)
            steps = [step_data(run.family, recipe, k, images, alone) for k in range(LOSS_IMAGES // recipe.batch)]
            with torch.no_grad():
                of = [run.family.loss(run.model, s.codes, s.labels, s.draws, recipe.objective) for s in steps]
            losses[w] = torch.cat(of).double()
            print(w, float(losses[w].mean()), file=sys.stderr, flush=True)
    rows = []
    for w, values in losses.items():
        change = values - losses[0.0]
        rows.append({"w": w, "change": float(change.mean()), "error": float(change.std()) / len(change) ** 0.5})
    found = {"images": len(losses[0.0]), "base_loss": float(losses[0.0].mean()), "rows": rows}
    (RESULTS / "diagnose_loss.json").write_text(json.dumps(found, indent=1) + "\n")


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(["toy", "small", "loss"]))
def main(what: str) -> None:
    {"toy": toy, "small": small, "loss": loss}[what]()


if __name__ == "__main__":
    main()
