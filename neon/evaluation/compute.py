"""Generated images against reference images or statistics: `compute` from Python in one line, and `neon fid calc`.

from neon.evaluation.compute import compute
compute("samples/", "real.zip", metrics=("fid", "precision", "recall")).metrics
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from torch import Tensor

from fid.evaluator import Collector, measure
from fid.features import Extractor, open_extractor
from fid.frechet import Gaussian, frechet_distance
from fid.infinity import check_size
from fid.metrics import SUBSET, cautions, check_score_size, check_subset_size
from fid.names import METRICS, Metric
from fid.reference import Reference, check_made_with, read_reference
from neon.evaluation.collect import Wanted
from neon.evaluation.evaluate import why_not_comparable
from neon.evaluation.on_disk import pass_over
from neon.images.arrays import from_array
from neon.images.formats import open_images
from neon.images.image_set import ImageSet
from neon.runtime.distributed import World, world
from neon.store import hub

Images = str | Path | Tensor | np.ndarray | ImageSet
"""A folder, .zip, .npz, .npy, IDX file or torchvision:NAME:SPLIT:FOLDER, or uint8 images (N, C, H, W), (N, H, W, C)."""
DISTANCES = {"fid", "fid_inf"}
COMPARED = {"kid", "kid_unbiased", "precision", "recall", "density", "coverage"}
"""Metrics that need the features of every reference image; DISTANCES need their mean and covariance alone."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """Which metrics, and how they are computed. batch: images per network call; resume: a folder for the sums so far,
    from which the same question, killed, goes on."""

    metrics: Sequence[Metric] = ("fid",)
    k: int = 3
    kid_subset: int = SUBSET
    batch: int = 64
    resume: Path | None = None

    def needs(self, metrics: set[str]) -> list[str]:
        return [metric for metric in self.metrics if metric in metrics]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """metrics: name (with N and extractor) -> value. reason: why they may not stand beside published ones, or None.
    cautions: what a reader of the values should be told."""

    metrics: dict[str, float]
    num_images: int
    reason: str | None
    cautions: list[str]
    seconds: dict[str, float]


def compute(
    generated: Images,
    reference: Images | None = None,
    *,
    reference_images: Images | None = None,
    metrics: Sequence[Metric] = ("fid",),
    extractor: str | Extractor = "inception-2015-12-05",
    weights: Path | None = None,
    k: int = 3,
    kid_subset: int = SUBSET,
    batch: int = 64,
    device: str | None = None,
    resume: Path | None = None,
) -> Comparison:
    """Metrics of generated images against a reference.

    reference: images, or statistics (.npz with mu and sigma) for fid and fid_inf; the metrics that compare with every
        reference image then need `reference_images` too.
    weights: of the extractor, default where they usually lie. k: nearest neighbours of precision, recall, density and
        coverage. kid_subset: images in every subset of a KID. resume: see Question.
    Raises FileNotFoundError or ValueError in one sentence, before the first image goes through the network where that
    can be known.
    """
    question = Question(metrics=metrics, k=k, kid_subset=kid_subset, batch=batch, resume=resume)
    with world(device) as ranks:
        opened = open_side(generated), None if reference is None else open_reference(reference)
        real = None if reference_images is None else open_side(reference_images)
        if isinstance(extractor, str):
            extractor = open_extractor(extractor, path=weights, device=ranks.device)
        found = ranks.broadcast(compare(*opened, real, extractor, question, ranks))
    if found is None:
        raise RuntimeError("rank 0 gave no answer")
    return found


def open_side(images: Images, what: str = "images") -> ImageSet:
    """One side of the comparison as an image set, without labels. what: its name, for messages."""
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, Tensor):
        images = images.cpu().numpy()
    if isinstance(images, np.ndarray):
        return from_array(Path("images in memory"), images)
    _check_is_path(images, what)
    return open_images(images, use_labels=False)


def _check_is_path(images: object, what: str) -> None:
    if not isinstance(images, (str, PathLike)):
        advice = "; a list of tensors becomes one by torch.stack" if isinstance(images, (list, tuple)) else ""
        kind = type(images).__name__
        raise ValueError(f"{what}: expected a path or one uint8 tensor or array (N, C, H, W), not {kind}{advice}")


def open_reference(source: Images) -> Reference | ImageSet:
    """Statistics, if the file holds mu and sigma, else images. Raises ValueError naming what was found instead."""
    if isinstance(source, Tensor | np.ndarray | ImageSet):
        return open_side(source)
    _check_is_path(source, "reference")
    path = hub.local(source)
    suffix = path.suffix.lower()
    is_idx = "idx" in path.name and suffix != ".npz"
    if path.is_file() and suffix not in (".zip", ".npy") and not is_idx:
        try:
            with zipfile.ZipFile(path) as archive:
                keys = {name.removesuffix(".npy") for name in archive.namelist()}
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
            keys = set()
        if not keys & {"images", "arr_0"} or {"mu", "sigma"} <= keys:
            return read_reference(path)
    return open_side(source)


def compare(
    generated: ImageSet,
    reference: Reference | ImageSet | None,
    reference_images: ImageSet | None,
    network: Extractor,
    question: Question,
    ranks: World,
) -> Comparison | None:
    """The answer on rank 0, None on the others: nobody waits for what one rank does alone."""
    if reference_images is None and isinstance(reference, ImageSet):
        reference_images = reference
    statistics = reference if isinstance(reference, Reference) else None
    check(generated, statistics, reference_images, network, question)
    notes = shape_cautions(generated, statistics, reference_images)
    started = time.perf_counter()
    real: Collector | None = None
    if reference_images is not None and (question.needs(COMPARED) or (question.needs(DISTANCES) and not statistics)):
        wanted = Wanted(extractor=network, keep_features=bool(question.needs(COMPARED)))
        seen = pass_over(reference_images, None, wanted, question.batch, question.resume, ranks, "reference")
        real = seen.collectors[0]
        notes += reference_images.remarks.sentences()
    reference_s = time.perf_counter() - started
    wanted = Wanted(extractor=network, metrics=question.metrics)
    found = pass_over(generated, None, wanted, question.batch, question.resume, ranks, "features")
    if not ranks.is_main:
        return None
    values = measure(
        question.metrics,
        generated=found.collectors[0],
        reference=statistics if statistics is not None or real is None else real.moments.gaussian(),
        reference_features=real.features if real is not None and question.needs(COMPARED) else None,
        k=question.k,
        kid_subset=question.kid_subset,
    )
    made_of = statistics.count if statistics is not None else None if real is None else real.moments.count
    notes += cautions(values, num_images=len(generated), extractor=network, reference_images=made_of)
    if statistics is not None and real is not None and question.needs(DISTANCES):
        notes += other_set_cautions(statistics, real.moments.gaussian())
    return Comparison(
        metrics=values,
        num_images=len(generated),
        reason=why_not_comparable(Wanted(extractor=network), len(generated)),
        cautions=[*notes, *generated.remarks.sentences()],
        seconds={
            "reference": reference_s,
            "reading": found.source_s,
            "features": found.feature_s,
            "total": time.perf_counter() - started,
        },
    )


def check(
    generated: ImageSet,
    statistics: Reference | None,
    reference_images: ImageSet | None,
    network: Extractor,
    question: Question,
) -> None:
    """Raise ValueError for everything that would fail after the pass and can be known before it."""
    if isinstance(question.metrics, str) or not question.metrics:
        raise ValueError(f"metrics must be a list of names, for example ('fid',), got {question.metrics!r}")
    if unknown := sorted(set(question.metrics) - set(METRICS)):
        raise ValueError(f"unknown metrics {', '.join(unknown)}; there are {', '.join(METRICS)}")
    if statistics is not None:
        check_made_with(statistics, network)
    if (named := question.needs(DISTANCES)) and statistics is None and reference_images is None:
        raise ValueError(f"{named[0]} needs a reference (--ref): statistics (.npz with mu and sigma) or images")
    compared = question.needs(COMPARED)
    if compared and reference_images is None:
        raise ValueError(
            f"{compared[0]} compares with every reference image: give images as the reference (--ref or --ref-data), "
            "statistics do not hold them"
        )
    smallest = len(generated)
    if reference_images is not None and (compared or statistics is None):
        smallest = min(smallest, len(reference_images))
    if smallest < 2:
        raise ValueError(f"a covariance needs at least 2 images in every set, the smallest has {smallest}")
    if "is" in question.metrics:
        if not network.num_classes:
            raise ValueError(f"the extractor {network.name} has no classes: it gives no Inception Score")
        check_score_size(len(generated))
    if "fid_inf" in question.metrics:
        check_size(len(generated))
    if "kid" in question.metrics:
        check_subset_size(smallest, question.kid_subset)
    if set(compared) - {"kid", "kid_unbiased"} and smallest <= question.k:
        raise ValueError(
            f"k = {question.k} neighbours need at least {question.k + 1} images in each set, got {smallest}"
        )
    for images in (generated, reference_images):
        if images is not None:
            _check_first(images, network)


def _check_first(images: ImageSet, network: Extractor) -> None:
    """Another size, number of channels or type than the extractor takes, found at one image."""
    try:
        network(images.subset([0]).read([0]))
    except ValueError as error:
        raise ValueError(f"{images.path}: {error}") from error


def shape_cautions(generated: ImageSet, statistics: Reference | None, reference_images: ImageSet | None) -> list[str]:
    """The reference's images have another size or number of channels: a comparison of two resolutions."""
    made = list(generated.shape)
    recorded = None if statistics is None else statistics.provenance.get("image_shape")
    real = None if reference_images is None else list(reference_images.shape)
    return [
        f"the images are {made} (channels, height, width), those of {name} {shape}"
        for name, shape in (("--ref", recorded), ("the reference set", real))
        if shape is not None and shape != made
    ]


def other_set_cautions(statistics: Gaussian, real: Gaussian) -> list[str]:
    """The statistics are not those of the reference images: precision and distance speak of different sets."""
    distance = frechet_distance(generated=real, reference=statistics)
    if distance <= 1e-3 * max(float(statistics.covariance.trace()), 1e-12):
        return []
    return [
        f"--ref and --ref-data are different sets (the Frechet distance between them is {distance:.4g}): the distance "
        "is to the one, the other metrics compare with the other"
    ]
