"""Time the evaluator at the size of the FID Inception: 2048 features.

    python scripts/bench/frechet.py --out results/bench/frechet.json

Frechet distance (plain, and against a reference whose factor is cached) beside scipy's sqrtm, the statistics update beside the
Inception's own time per image, and precision/recall within a stated memory budget. One to three minutes on 2 idle cores.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import scipy
import scipy.linalg
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fid.frechet import Gaussian, frechet_distance  # noqa: E402
from fid.inception import InceptionExtractor, InceptionV3  # noqa: E402
from fid.moments import Moments  # noqa: E402
from fid.neighbours import neighbours  # noqa: E402

DIM = 2048


def best_of(repeats: int, action: Callable[[], object]) -> float:
    """Seconds of the fastest of `repeats` calls: the others were disturbed."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def features(n: int, seed: int) -> Tensor:
    """Non-negative, correlated, with a spectrum that falls like a power: as pooled ReLU features are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)) * torch.arange(1, DIM + 1)[:, None] ** -0.7
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

    def with_scipy() -> float:
        root = scipy.linalg.sqrtm(one.covariance.numpy() @ two.covariance.numpy())
        offset = (one.mean - two.mean).square().sum().item()
        return offset + float(one.covariance.trace() + two.covariance.trace()) - 2 * float(np.trace(root).real)

    start = time.perf_counter()
    theirs = with_scipy()
    scipy_s = time.perf_counter() - start
    return {
        "frechet_s": best_of(repeats, lambda: frechet_distance(generated=fresh(one), reference=fresh(two))),
        "frechet_cached_reference_s": best_of(repeats, lambda: frechet_distance(generated=fresh(one), reference=two)),
        "frechet_1000_images_s": best_of(repeats, lambda: frechet_distance(generated=fresh(few), reference=two)),
        "scipy_sqrtm_s": scipy_s,
        "frechet_value": frechet_distance(generated=one, reference=two),
        "scipy_value": theirs,
    }


def bench_update(repeats: int, batch: int) -> dict[str, float]:
    torch.manual_seed(0)
    extractor = InceptionExtractor(InceptionV3(), sha256="0" * 64)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    inception_s = best_of(repeats, lambda: extractor(images)) / batch
    moments, pool = Moments(DIM), features(batch, 4)
    update_s = best_of(repeats, lambda: moments.update(pool)) / batch
    return {"inception_s_per_image": inception_s, "update_s_per_image": update_s, "update_share": update_s / inception_s, "batch": batch}


def bench_neighbours(points: int, budget_mib: int) -> dict[str, float]:
    one, two = features(points, 5), features(points, 6)
    start = time.perf_counter()
    neighbours(generated=one, reference=two, k=5, budget_mib=budget_mib)
    seconds = time.perf_counter() - start
    return {"points": points, "budget_mib": budget_mib, "seconds": seconds, "seconds_extrapolated_to_50k": seconds * (50_000 / points) ** 2}


@click.command(help=__doc__)
@click.option("--repeats", default=5, show_default=True)
@click.option("--batch", default=16, show_default=True, help="images per Inception call")
@click.option("--points", default=4000, show_default=True, help="points per set for precision/recall; 50000 is the real thing")
@click.option("--budget-mib", default=1024, show_default=True, help="memory budget of precision/recall")
@click.option("--out", type=click.Path(path_type=Path), help="write the JSON there as well")
def main(repeats: int, batch: int, points: int, budget_mib: int, out: Path | None) -> None:
    load = os.getloadavg()[0]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    result = {
        "frechet": bench_frechet(repeats),
        "update": bench_update(repeats, batch),
        "neighbours": bench_neighbours(points, budget_mib),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, load {load:.1f} at the start",
        "versions": {"torch": torch.__version__, "scipy": scipy.__version__},
        "commit": commit,
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
