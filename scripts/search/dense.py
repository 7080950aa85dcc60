"""The dense grid that the search is judged by: features of the same noise at every (w, cfg_scale), kept in files.

\b
python scripts/search/dense.py configs/demo.toml --ws=0,0.8,1.2,1.6,2.2 --num-images 300 --out runs/search-study/demo
python scripts/search/dense.py configs/small/var.toml --ws=0,0.75,1.5,2.25 --cfg-scales 0,1,2 --num-images 2000 \\
    --out runs/search-study/var --set ...                 # every entry of VAR_SHORT in study.py

VAR's whole grid: again with --ws=0.4,1.1 --cfg-scales 1,2 and with --ws=0,0.75,1.1,1.5 --cfg-scales 1.5.
S and the fine-tune of every seed are the config's own (`synth.first_seed` and `finetune.seed` differ); the images come
from held-out seeds, not from those that the search sees.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from neon.checkpoints import checkpoint  # noqa: E402
from neon.merge import LiveMerge  # noqa: E402
from neon.pipeline.experiment import load  # noqa: E402
from neon.pipeline.run import Run  # noqa: E402
from neon.runtime.distributed import World, world  # noqa: E402
from neon.sampling.generate import generate, to_images  # noqa: E402
from neon.store import files  # noqa: E402

FIRST_SEED = 3_000_000
"""Of the dense grid's noise: apart from synth, select and report in every config."""


def seeded(config: Path, seed: int, folder: Path, ranks: World, overrides: tuple[str, ...] = ()) -> Run:
    """The config with another synthetic set and fine-tune."""
    changed = [f"synth.first_seed={seed * 10_000}", f"finetune.seed={seed}", *overrides]
    return Run(load(config, changed), folder / f"seed-{seed}", ranks)


def features(
    run: Run, snapshot: Path, w: float, cfg_scale: float | None, num_images: int, first_seed: int = FIRST_SEED
) -> np.ndarray:
    """(num_images, D) float32 of the first extractor, at one point of the grid."""
    tensors = checkpoint.read(snapshot, weights="any").tensors
    LiveMerge(run.model, run.base_tensors, tensors).set_w(w)
    source = run.source("balanced", first_seed, cfg_scale)
    batches = run.world.batches(num_images, run.sampling.batch)
    extract = run.yardsticks[0].extractor
    images = (to_images(source, b.codes) for b in generate(source, run.model, batches, run.world.device))
    return torch.cat([extract(part).pool for part in images]).cpu().numpy()


@click.command(help=__doc__)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--seeds", default="0,1,2,3,4", show_default=True, help="Synthetic sets.")
@click.option("--ws", required=True, help="Values of w, with commas.")
@click.option("--cfg-scales", default="", help="Values of cfg_scale, with commas; none for a family without guidance.")
@click.option("--num-images", type=int, required=True, help="Images of every point.")
@click.option(
    "--first-seed", type=int, default=FIRST_SEED, show_default=True, help="Another noise; name another --out."
)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--set", "overrides", multiple=True, help="Another value of the config, as in `neon run`.")
def main(
    config: Path,
    seeds: str,
    ws: str,
    cfg_scales: str,
    num_images: int,
    first_seed: int,
    out: Path,
    overrides: tuple[str, ...],
) -> None:
    scales: list[float | None] = [float(c) for c in cfg_scales.split(",")] if cfg_scales else [None]
    places = list(itertools.product(scales, map(float, ws.split(","))))
    with world() as ranks:
        for seed in map(int, seeds.split(",")):
            fill(seeded(config, seed, out, ranks, overrides), out, f"seed-{seed}", places, num_images, first_seed)


def fill(
    run: Run, out: Path, name: str, places: Sequence[tuple[float | None, float]], num_images: int, first_seed: int
) -> None:
    """The files of one synthetic set; places: (cfg_scale, w)."""
    snapshot = run.finetune()[-1]
    for cfg_scale, w in places:
        # the base is the same whatever S is: one file for all seeds
        folder = out / ("dense-base" if w == 0 else f"{name}/dense")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"w{w:g}-cfg{cfg_scale}.npy"
        if path.is_file() and len(np.load(path, mmap_mode="r")) >= num_images:
            continue
        found = features(run, snapshot, w, cfg_scale, num_images, first_seed)
        with files.replacing(path) as stream:
            np.save(stream, found)
        print(path, flush=True)


if __name__ == "__main__":
    main()
