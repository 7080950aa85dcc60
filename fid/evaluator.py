"""All metrics from one pass over the images: collect, then measure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from fid.features import Extractor
from fid.frechet import Gaussian, frechet_distance
from fid.infinity import frechet_infinity
from fid.metrics import (
    NEIGHBOUR_METRICS,
    SUBSET,
    frechet_kind,
    inception_score,
    kernel_distance,
    kernel_distance_unbiased,
    metric_name,
)
from fid.moments import Moments
from fid.names import METRICS, Metric
from fid.precision_recall import precision_recall
from fid.store import FeatureStore

T = TypeVar("T")


class Collector:
    """Streams the images of one set through an extractor and keeps what the metrics need: sums always (for the Frechet
    distance), every feature and logit only if one of them asks for it.

    num_images: of the whole set; image i is the same image for any batch, rank or machine that brings it.
    folder: where kept features lie, so that a killed evaluation can go on; default: memory, or a temporary file
        past 1 GiB.
    keep_features: also where no metric asks for every one of them.
    Raises ValueError for an unknown metric, or for the Inception Score of an extractor without classes.
    """

    def __init__(
        self,
        extractor: Extractor,
        num_images: int,
        metrics: Collection[Metric],
        *,
        folder: Path | None = None,
        keep_features: bool = False,
    ):
        unknown = sorted(set(metrics) - set(METRICS))
        if unknown:
            raise ValueError(f"unknown metrics {', '.join(unknown)}; there are {', '.join(METRICS)}")
        if "is" in metrics and not extractor.num_classes:
            raise ValueError(f"the extractor {extractor.name} has no classes: it gives no Inception Score")
        self.extractor, self.num_images = extractor, num_images
        self.moments = Moments(extractor.dim)
        self.stores: dict[str, FeatureStore] = {}
        if keep_features or set(metrics) - {"fid", "is"}:
            self.stores["features"] = FeatureStore(num_images, extractor.dim, file=folder and folder / "features.f32")
        if "is" in metrics:
            self.stores["logits"] = FeatureStore(
                num_images, extractor.num_classes, file=folder and folder / "logits.f32"
            )

    def update(self, images: Tensor, indices: Sequence[int]) -> None:
        """Add the images `indices`, uint8 (B, C, H, W). Raises ValueError if a kept one comes twice, or for
        another number of indices."""
        if len(indices) != len(images):
            raise ValueError(f"{len(images)} images came with {len(indices)} indices: each has its place in the set")
        pool, logits = self.extractor(images)
        if "features" in self.stores:
            self.stores["features"].put(indices, pool)
        if "logits" in self.stores and logits is not None:
            self.stores["logits"].put(indices, logits)
        self.moments.update(pool)

    def state(self) -> dict[str, Tensor]:
        """What a killed evaluation needs beside the files in `folder`, to be saved with torch.save or safetensors."""
        state = {f"moments.{key}": value for key, value in self.moments.state().items()}
        for name, store in self.stores.items():
            state |= {f"{name}.{key}": value for key, value in store.state().items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`; what came after it was taken counts as absent and comes again."""
        self.moments = Moments.from_state(
            {key.removeprefix("moments."): state[key] for key in state if key.startswith("moments.")}
        )
        for name, store in self.stores.items():
            store.load_state({key.removeprefix(f"{name}."): state[key] for key in state if key.startswith(f"{name}.")})

    @property
    def features(self) -> Tensor:
        """(num_images, dim), for the metrics that keep them. Raises ValueError if they were not kept or one is
        missing."""
        if "features" not in self.stores:
            raise ValueError("the features were not kept: name the metrics that need them when the Collector is made")
        return self.stores["features"].tensor()


def measure(
    metrics: Collection[Metric],
    *,
    generated: Collector,
    reference: Gaussian | None = None,
    reference_features: Tensor | None = None,
    k: int = 3,
    kid_subset: int = SUBSET,
) -> dict[str, float]:
    """{metric's name with N and extractor: value} of a complete set.

    fid: needs `reference`, statistics made by the same extractor; called "fd" if the extractor is not the FID
        Inception.
    fid_inf: the extrapolation to infinite N and `..._error`, its standard error. is, kid: mean over splits or
    subsets of `kid_subset` images and `..._std`; kid_unbiased (also beside kid): the value on the full sets.
    precision, recall, density, coverage: k nearest neighbours.
    kid, kid_unbiased and the last four need `reference_features` (M, dim).
    Raises ValueError if not exactly num_images images were counted or something needed is absent.
    """
    extractor, n = generated.extractor, generated.num_images
    if generated.moments.count != n:
        raise ValueError(f"{generated.moments.count} images were counted, expected {n}")
    values: dict[str, float] = {}
    if "fid" in metrics:
        values[frechet_kind(extractor)] = frechet_distance(
            generated=generated.moments.gaussian(), reference=_needed(reference, "fid")
        )
    if "fid_inf" in metrics:
        name, limit = (
            f"{frechet_kind(extractor)}_inf",
            frechet_infinity(generated=generated.features, reference=_needed(reference, "fid_inf")),
        )
        values |= {name: limit.value, f"{name}_error": limit.error}
    if "is" in metrics:
        score = inception_score(generated.stores["logits"].tensor())
        values |= {"is": score.mean, "is_std": score.std}
    named = {metric_name(metric, n, extractor.name): value for metric, value in values.items()}
    if "kid" in metrics:
        features = _needed(reference_features, "kid")
        kid = kernel_distance(generated=generated.features, reference=features, subset_size=kid_subset)
        for metric, value in (("kid", kid.mean), ("kid_std", kid.std)):
            named[metric_name(metric, n, extractor.name, subset=kid_subset)] = value
    if "kid" in metrics or "kid_unbiased" in metrics:
        features = _needed(reference_features, "kid_unbiased")
        full = kernel_distance_unbiased(generated=generated.features, reference=features)
        named[metric_name("kid_unbiased", n, extractor.name)] = full
    wanted = [metric for metric in NEIGHBOUR_METRICS if metric in metrics]
    if wanted:
        features = _needed(reference_features, wanted[0])
        found = precision_recall(
            generated=generated.features, reference=features, k=k, device=extractor.device
        )._asdict()
        named |= {metric_name(metric, n, extractor.name, k): found[metric] for metric in wanted}
    return named


def _needed(value: T | None, metric: str) -> T:
    if value is None:
        raise ValueError(
            f"{metric} needs a reference: statistics for fid, features of the reference images for the others"
        )
    return value
