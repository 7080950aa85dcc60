"""Does `neon diagnose` say the right sign of w? On the toy's models of study.py, against the truth of its dense grid.

python scripts/search/study.py toy && python scripts/search/diagnosis.py      # writes results/search/diagnose.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from neon.toy.experiment import Model  # noqa: E402
from neon.toy.gradients import gradient  # noqa: E402
from neon.toy.stack import Weights  # noqa: E402
from neon.toy.target import real_points  # noqa: E402
from neon.training.alignment import Gradients, align  # noqa: E402
from scripts.search.study import RESULTS, toy_replicas  # noqa: E402

NUM_POINTS, NUM_BATCHES = 32_000, 32


def gradients(model: Model, base: Weights, points_1N2: Tensor, first_seed: int) -> Gradients:
    """Of batch k, with draws of its own."""
    batches = points_1N2.chunk(NUM_BATCHES, dim=1)

    def at(k: int, offset: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        weights = base if offset is None else {name: base[name] + offset[name] for name in base}
        return gradient(model, weights, batches[k], seed=first_seed + k)

    return at


def main() -> None:
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


if __name__ == "__main__":
    main()
