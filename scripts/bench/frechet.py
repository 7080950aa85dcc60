"""Time the evaluator at the size of the FID Inception: 2048 features.

\b
    python scripts/bench/frechet.py --out results/bench/frechet.json

Frechet distance (plain, and against a reference whose factor is cached) beside scipy's sqrtm, the statistics update
beside the Inception's own time per image, and precision/recall within a stated memory budget. One to three minutes on 2
idle cores.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import scipy
import scipy.linalg
import torch
from measuring import about, peak_mib, publish, reset_peak, seconds_of
from torch import Tensor

from fid.frechet import Gaussian, frechet_distance
from fid.inception import InceptionExtractor, InceptionV3
from fid.moments import Moments
from fid.precision_recall import precision_recall

DIM = 2048
CPU = torch.device("cpu")


def features(n: int, seed: int) -> Tensor:
    """Non-negative, correlated, with a spectrum that falls like a power: as pooled ReLU features are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = (
        torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)) * torch.arange(1, DIM + 1)[:, None] ** -0.7
    )
    return torch.relu(torch.randn(n, DIM, generator=generator) @ mixing / 4 + 0.2)


def gaussian(n: int, seed: int) -> Gaussian:
    moments = Moments(DIM)
    for batch in features(n, seed).split(1000):
        moments.update(batch)
    return moments.gaussian()


def fresh(one: Gaussian) -> Gaussian:
    return Gaussian(one.mean, one.covariance, one.count)


def bench_frechet(repeats: int) -> dict[str, float]:
    one, two, few = gaussian(6000, 1), gaussian(6000, 2), gaussian(1000, 3)
    frechet_distance(generated=one, reference=two)  # caches two's factor

    references, samples = (iter([fresh(of) for _ in range(repeats)]) for of in (two, few))  # without factors
    theirs: list[float] = []

    def with_scipy() -> None:
        root = scipy.linalg.sqrtm(one.covariance.numpy() @ two.covariance.numpy())
        offset = (one.mean - two.mean).square().sum().item()
        theirs.append(offset + float(one.covariance.trace() + two.covariance.trace()) - 2 * float(np.trace(root).real))

    return {
        "frechet_s": seconds_of(lambda: frechet_distance(generated=one, reference=next(references)), CPU, repeats),
        "frechet_cached_reference_s": seconds_of(lambda: frechet_distance(generated=one, reference=two), CPU, repeats),
        "frechet_1000_images_s": seconds_of(
            lambda: frechet_distance(generated=next(samples), reference=two), CPU, repeats
        ),
        "scipy_sqrtm_s": seconds_of(with_scipy, CPU),
        "frechet_value": frechet_distance(generated=one, reference=two),
        "scipy_value": theirs[0],
    }


def bench_update(repeats: int, batch: int) -> dict[str, float]:
    torch.manual_seed(0)
    extractor = InceptionExtractor(InceptionV3(), sha256="0" * 64)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    inception_s = seconds_of(lambda: extractor(images), CPU, repeats) / batch
    moments, pool = Moments(DIM), features(batch, 4)
    update_s = seconds_of(lambda: moments.update(pool), CPU, repeats) / batch
    return {
        "inception_s_per_image": inception_s,
        "update_s_per_image": update_s,
        "update_share": update_s / inception_s,
        "batch": batch,
    }


def bench_neighbours(points: int, budget_mib: int) -> dict[str, float]:
    one, two = features(points, 5), features(points, 6)
    reset_peak(CPU)
    before = peak_mib(CPU)
    seconds = seconds_of(lambda: precision_recall(generated=one, reference=two, k=5, budget_mib=budget_mib), CPU)
    return {
        "points": points,
        "budget_mib": budget_mib,
        "peak_beyond_features_mib": peak_mib(CPU) - before,
        "seconds": seconds,
        "seconds_extrapolated_to_50k": seconds * (50_000 / points) ** 2,
    }


@click.command(help=__doc__)
@click.option("--repeats", default=5, show_default=True)
@click.option("--batch", default=16, show_default=True, help="images per Inception call")
@click.option(
    "--points", default=4000, show_default=True, help="points per set for precision/recall; 50000 is the real thing"
)
@click.option("--budget-mib", default=1024, show_default=True, help="memory budget of precision/recall")
@click.option("--out", type=click.Path(path_type=Path), help="write the JSON there as well")
def main(repeats: int, batch: int, points: int, budget_mib: int, out: Path | None) -> None:
    result = about(CPU) | {"scipy": scipy.__version__}
    result |= {
        "frechet": bench_frechet(repeats),
        "update": bench_update(repeats, batch),
        "neighbours": bench_neighbours(points, budget_mib),
    }
    publish(result, out)


if __name__ == "__main__":
    main()
