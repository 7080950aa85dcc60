"""Weights to numbers: sample, quantise, extract features, sum moments, all in memory. Only counts and sums travel, and
the features only if a metric needs every one of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from fid.evaluator import Collector, measure
from fid.metrics import frechet_kind, metric_name
from fid.reference import Reference
from neon.evaluation.collect import Wanted, collect
from neon.own_code import source_sha256
from neon.runtime.distributed import World
from neon.sampling.generate import Source, generate, to_images
from neon.store.shards import Corpus


@dataclass(frozen=True, kw_only=True)
class Yardstick(Wanted):
    """An extractor, what its features are compared with, and the metrics that are wanted of it."""

    reference: Reference | None = None
    """Statistics by the same extractor; the Frechet distance needs them."""
    reference_features: Tensor | None = None
    """(M, dim) features of reference images; kid, precision, recall, density and coverage need them."""
    k: int = 3
    """Nearest neighbours of precision, recall, density and coverage."""

    def headline(self, num_images: int) -> str:
        """Name of the metric that chooses w; smaller is better."""
        return metric_name(frechet_kind(self.extractor), num_images, self.extractor.name)

    def values(self, collector: Collector) -> dict[str, float]:
        """Every metric of a set that was collected completely."""
        return measure(
            self.metrics,
            generated=collector,
            reference=self.reference,
            reference_features=self.reference_features,
            k=self.k,
        )

    def try_out(self, images: Corpus, num_images: int) -> None:
        """Raise, before the fine-tune, what can be told from images of the base (the set will have num_images of them):
        nothing where features are compared."""

    @property
    def identity(self) -> dict[str, str | None]:
        """What a value depends on besides the images."""
        source = source_sha256(type(self.extractor))
        return {
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "reference_sha256": None if self.reference is None else self.reference.sha256,
        } | ({} if source is None else {"extractor_source": source})


@dataclass(frozen=True)
class Evaluation:
    """What one set of weights scored. metrics: name (with N and extractor) -> value; shown: the first images, uint8;
    features: (num_images, dim) of every yardstick that keeps them."""

    metrics: dict[str, float]
    seconds: dict[str, float]
    num_images: int
    shown: Tensor | None
    features: Mapping[str, Tensor] = field(default_factory=dict)


def evaluate(
    source: Source,
    model: nn.Module,
    num_images: int,
    yardsticks: Sequence[Yardstick],
    world: World,
    *,
    num_shown: int = 0,
    partial: Path | None = None,
    desc: str = "evaluate",
) -> Evaluation:
    """Every yardstick's metrics of `num_images` images, from one pass over them.

    partial: see `neon.evaluation.collect.collect`; unique to weights and protocol.
    Raises ValueError if not exactly num_images images were counted, DivergedError if some are not numbers.
    """
    started = time.perf_counter()

    def images(batches: Sequence[range]) -> Iterator[tuple[Sequence[int], Tensor]]:
        for batch in generate(source, model, batches, world.device):
            yield batch.indices, to_images(source, batch.codes)

    found = collect(
        images,
        yardsticks,
        range(num_images),
        source.sampling.batch,
        world,
        num_shown=num_shown,
        partial=partial,
        desc=desc,
    )
    metrics: dict[str, float] = {}
    for yardstick, collector in zip(yardsticks, found.collectors, strict=True):
        metrics |= yardstick.values(collector)
    total_s = time.perf_counter() - started
    seconds = {
        "sampling": found.source_s,
        "features": found.feature_s,
        "metrics": total_s - found.source_s - found.feature_s,
    }
    features = {
        y.extractor.name: c.features for y, c in zip(yardsticks, found.collectors, strict=True) if y.keep_features
    }
    return Evaluation(metrics, seconds | {"total": total_s}, num_images, found.shown, features)


def why_not_comparable(yardstick: Wanted, num_images: int) -> str | None:
    """None if the number may stand beside published FIDs, else the reason why not."""
    if yardstick.extractor.comparable is not None:
        return yardstick.extractor.comparable
    if num_images != 50_000:
        return f"published FIDs use 50,000 images, this one {num_images:,}; fewer images give a larger value"
    return None


def spread(values: Sequence[float]) -> dict[str, object]:
    """Every value of a repeated evaluation with mean, std and minimum."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {
        "values": list(values),
        "mean": statistics.fmean(values),
        "std": std,
        "min": min(values),
        "note": "papers quote the minimum of three",
    }
