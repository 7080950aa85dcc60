"""Names of metrics, the Inception Score and the kernel distance (KID)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fid.features import Extractor

NEIGHBOUR_METRICS = ("precision", "recall", "density", "coverage")
SPLITS = 10
"""Parts of the Inception Score, as published."""
MIN_PER_SPLIT = 5
"""Images in every part of an Inception Score, at least: in a part of one image the score is 1 whatever the image."""
SUBSET = 1000
"""Images in every subset of a KID, as published."""


def metric_name(metric: str, num_images: int, extractor: str, k: int | None = None, subset: int | None = None) -> str:
    """A name that says what a value may be compared with: "fid50k[inception-2015-12-05]",
    "precision10k[fashion-cnn,k=5]", "kid500[fashion-cnn,subset=100]".

    num_images: of the generated set; whole thousands are written as "50k". k: neighbours, for the metrics that have
        them. subset: of a KID, in the name unless it is the usual 1000.
    Raises ValueError if a neighbour metric comes without k, or another one with it.
    """
    if (k is not None) != (metric in NEIGHBOUR_METRICS):
        raise ValueError(f"{metric} {'has no k' if k is not None else 'needs its k in the name'}")
    count = f"{num_images // 1000}k" if num_images >= 1000 and num_images % 1000 == 0 else str(num_images)
    options = "" if k is None else f",k={k}"
    options += "" if subset in (None, SUBSET) else f",subset={subset}"
    return f"{metric}{count}[{extractor}{options}]"


def frechet_kind(extractor: Extractor) -> str:
    """What a Frechet distance on these features is called: "fid" for the published Inception alone, else "fd"."""
    return "fid" if extractor.comparable is None else "fd"


def cautions(
    values: Mapping[str, float], *, num_images: int, extractor: Extractor, reference_images: int | None = None
) -> list[str]:
    """What a reader of these values should be told: one sentence each, none if there is nothing to say.

    values: {metric's name: value} of `num_images` images, as `fid.evaluator.measure` gives them.
    reference_images: how many the reference's statistics were made of; None if nobody knows.
    """
    kind = frechet_kind(extractor)
    distance = values.get(metric_name(kind, num_images, extractor.name))
    limit = values.get(metric_name(f"{kind}_inf", num_images, extractor.name))
    notes = []
    if distance is not None and num_images <= extractor.dim:
        notes.append(
            f"{num_images} images for {extractor.dim} features: the covariance is singular and the bias large; use "
            "many times more images"
        )
    if (distance is not None or limit is not None) and 0 < (reference_images or 0) <= extractor.dim:
        notes.append(
            f"the reference is made of {reference_images} images for {extractor.dim} features: its covariance is "
            "singular and the bias large; make it of many times more images"
        )
    if limit is not None and num_images // 4 <= extractor.dim:
        notes.append(
            f"{kind}_inf extrapolates from parts of {num_images // 4} images, which is not more than the "
            f"{extractor.dim} features: the bias is no straight line in 1/n there; use many times more images"
        )
    if distance is not None and distance < 1e-3:
        notes.append(
            f"a distance of {distance:.2g} is what identical sets give: is the reference made of the evaluated images?"
        )
    return notes


class Spread(NamedTuple):
    """Mean and population standard deviation over splits or subsets."""

    mean: float
    std: float


def inception_score(logits: Tensor, *, splits: int = SPLITS, seed: int = 2020) -> Spread:
    """exp of the mean KL(p(y|x) || p(y)) over `splits` parts of the shuffled images (Salimans et al. 2016).

    logits: (N, K), for the published score those without the last layer's bias. The shuffle matters: in class order
    every part would see few classes. numpy's RandomState(2020) is torch-fidelity's choice. Raises ValueError for fewer
    than MIN_PER_SPLIT images per part.
    """
    check_score_size(len(logits), splits)
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    log_p = logits.cpu().double()[order].log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        marginal = torch.logsumexp(part, 0) - np.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    return _spread(torch.stack(scores))


def check_score_size(num_images: int, splits: int = SPLITS) -> None:
    """Raise ValueError if there are too few images for an Inception Score."""
    if num_images < splits * MIN_PER_SPLIT:
        raise ValueError(
            f"the Inception Score over {splits} splits needs at least {splits * MIN_PER_SPLIT} images "
            f"({MIN_PER_SPLIT} in each: with one it is always 1), got {num_images}"
        )


def check_subset_size(num_images: int, subset: int) -> None:
    """Raise ValueError if the smaller of the two sets has too few images for a KID over subsets."""
    if num_images < subset:
        raise ValueError(
            f"KID over subsets of {subset} needs that many images in both sets, got {num_images}: give a smaller "
            "subset (it becomes part of the metric's name) or ask for kid_unbiased, the value on the full sets"
        )


def kernel_distance(
    *, generated: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = SUBSET, seed: int = 2020
) -> Spread:
    """KID (Binkowski et al. 2018): mean and std of `kernel_distance_unbiased` over random subsets of both sets.

    generated: (N, D), reference: (M, D). Subsets are drawn without replacement by numpy's RandomState(seed),
    generated first, as torch-fidelity draws them. Scalar products are float32 and all that follows float64, which is
    within 1e-6 of the value in float64. Raises ValueError if a set is smaller than a subset.
    """
    check_subset_size(min(len(generated), len(reference)), subset_size)
    rng = np.random.RandomState(seed)
    sets = [features.float().cpu().numpy() for features in (generated, reference)]
    values = []
    for _ in range(subsets):
        x, y = (features[rng.choice(len(features), subset_size, replace=False)] for features in sets)
        within = _kernel_total(x, x) + _kernel_total(y, y)
        values.append(within / (subset_size * (subset_size - 1)) - 2 * _kernel_total(x, y) / subset_size**2)
    return _spread(torch.tensor(values, dtype=torch.float64))


def _kernel_total(a: np.ndarray, b: np.ndarray) -> float:
    """The kernel's sum over all pairs; where a is b, over those of two different points."""
    dim = a.shape[1]
    # numpy's product takes half the time where a is b (BLAS's syrk), torch's does not
    products = a @ b.T
    if a is b:
        np.fill_diagonal(products, -dim)
    total = 0.0
    for rows in torch.from_numpy(products).split(64):  # small enough for the processor's cache
        shifted = rows.double().add_(dim).flatten()
        total += torch.dot(shifted.square(), shifted).item()
    return total / dim**3


def kernel_distance_unbiased(*, generated: Tensor, reference: Tensor, budget_mib: int = 512) -> float:
    """Unbiased squared MMD of the two sets with the kernel (x.y / D + 1)^3; it may be negative when they agree.

    generated: (N, D), reference: (M, D), N, M >= 2. float64; needs at most about `budget_mib` beside the features.
    """
    n, m = len(generated), len(reference)
    if min(n, m) < 2:
        raise ValueError(f"the unbiased kernel distance needs at least 2 images in each set, got {n} and {m}")
    within = _kernel_sum(generated, generated, budget_mib) - _kernel_diagonal(generated)
    within_reference = _kernel_sum(reference, reference, budget_mib) - _kernel_diagonal(reference)
    between = _kernel_sum(generated, reference, budget_mib)
    return within / (n * (n - 1)) + within_reference / (m * (m - 1)) - 2 * between / (n * m)


def _kernel_sum(a: Tensor, b: Tensor, budget_mib: int) -> float:
    rows = max(1, budget_mib * 2**20 // 8 // (2 * len(b) + a.shape[1]))
    columns = b.double().T
    return sum((block.double() @ columns / a.shape[1]).add_(1).pow_(3).sum().item() for block in a.split(rows))


def _kernel_diagonal(x: Tensor) -> float:
    return sum((block.double().square().sum(1) / x.shape[1] + 1).pow(3).sum().item() for block in x.split(4096))


def _spread(values: Tensor) -> Spread:
    return Spread(values.mean().item(), values.std(correction=0).item())
