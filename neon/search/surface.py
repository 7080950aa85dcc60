"""The Frechet distance as a function of (w, cfg_scale), from few images: a polynomial in the moments of the features.

Every point is judged by the same noise, so mean and covariance of the features move smoothly with (w, cfg_scale), far
more smoothly than their distance to the reference. A least-squares polynomial through the points' moments is, at any
other place, a weighted sum of them, with weights that depend on the places alone:

    mean(x) = sum_p a_p(x) mean_p,   covariance(x) = sum_p a_p(x) covariance_p,   sum_p a_p(x) = 1

The distance is read off these moments. Its finite-N bias is extrapolated away from the two halves of the images (their
mean distance has twice the bias, to first order). Its uncertainty is a bootstrap over images: the first-order change of
the distance by every image (its influence), summed with random multipliers; one image has one multiplier at all places.
"""

# N images, D features, P points, K places where the distance is wanted, B bootstrap draws, R the reference's rank

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fid.frechet import Gaussian, frechet_distance

NUM_DRAWS = 400
BLOCK = 1 << 20
"""Numbers of a product that are held at once (8 MiB): what fits the cache of a core."""
TERMS = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2), (3, 0))
"""Powers of (w, cfg_scale) in the order in which more points allow them."""


@dataclass(frozen=True, order=True)
class Place:
    """Where the distance is wanted. cfg_scale 0 stands for a family without guidance."""

    w: float
    cfg_scale: float = 0.0


def polynomial_weights(points: Sequence[Place], places: Sequence[Place], trust: Tensor) -> Tensor:
    """a (K, P): the least-squares polynomial through values at `points`, at `places`, is a @ values.

    As many of TERMS as the points determine; three values of w give a parabola, six spread points a quadratic surface.
    trust: (P,) how much a point's misfit counts where there are more points than terms.
    """
    at_points, at_places = _powers(points, points), _powers(places, points)
    chosen: list[int] = []
    for term in range(len(TERMS)):
        columns = at_points[:, [*chosen, term]]
        is_spare = sum(TERMS[term]) < 3 or len(points) > len(chosen) + 1  # a cubic only where it can be contradicted
        if is_spare and torch.linalg.matrix_rank(columns, rtol=1e-6) > len(chosen):
            chosen.append(term)
    root = trust.sqrt()
    return at_places[:, chosen] @ torch.linalg.pinv(root[:, None] * at_points[:, chosen]) * root


def _powers(places: Sequence[Place], points: Sequence[Place]) -> Tensor:
    """(K, terms), both coordinates scaled to [-1, 1] over `points`: else the powers are nearly parallel."""
    columns = []
    for name in ("w", "cfg_scale"):
        own = [getattr(p, name) for p in points]
        middle, half = (max(own) + min(own)) / 2, (max(own) - min(own)) / 2 or 1.0
        columns.append(torch.tensor([(getattr(p, name) - middle) / half for p in places], dtype=torch.float64))
    return torch.stack([columns[0] ** i * columns[1] ** j for i, j in TERMS], dim=1)


@dataclass(frozen=True, eq=False)
class Surface:
    """The distance at `places`. values: (K,), bias-corrected; draws: (B, K), what it might be with other images."""

    places: Sequence[Place]
    values: Tensor
    draws: Tensor
    bias: Tensor
    """(K,) what was taken off."""

    @property
    def best(self) -> int:
        return int(self.values.argmin())

    @property
    def noise(self) -> float:
        """Standard error of the value at the best place."""
        return float(self.draws[:, self.best].std())

    @property
    def expected_gain(self) -> float:
        """How much lower than at the best place the distance is expected to be where it truly is lowest."""
        return float((self.draws[:, self.best] - self.draws.min(dim=1).values).mean())

    @property
    def gain_error(self) -> float:
        """Standard error with which as many other images would show that gain: of the difference between the best place
        and where the distance truly is lowest, on the same images."""
        lowest, counts = self.draws.argmin(dim=1).unique(return_counts=True)
        errors = (self.draws[:, self.best, None] - self.draws[:, lowest]).std(dim=0)
        return float((errors * counts).sum() / counts.sum())

    def difference(self, i: int, j: int) -> tuple[float, float]:
        """values[i] - values[j] and its standard error: the same images at both, so far sharper than the values."""
        return float(self.values[i] - self.values[j]), float((self.draws[:, i] - self.draws[:, j]).std())


def surface(
    points: Sequence[Place],
    features: Sequence[Tensor] | Tensor,
    reference: Gaussian,
    places: Sequence[Place],
    *,
    num_classes: int = 1,
    trust: Tensor | None = None,
) -> Surface:
    """features: (N, D) of every point: of the same images everywhere, or of the first of them. Image i has the label
    i % num_classes (1: drawn).

    trust: see `polynomial_weights`. Raises ValueError for fewer than 2 images of every class, or than 4 in all.
    """
    counts = [len(rows) for rows in features]
    if min(counts) < max(4, 2 * num_classes):
        raise ValueError(
            f"{min(counts)} images of {num_classes} classes: at least 2 of every class are needed, and 4 in all"
        )
    weights = polynomial_weights(points, places, torch.ones(len(points)).double() if trust is None else trust)
    wholes = [rows.double() for rows in features]
    firsts, seconds = zip(*(_halves(rows, num_classes) for rows in wholes), strict=True)
    moments = [_moments(parts) for parts in (wholes, firsts, seconds)]
    sizes = [min(map(len, parts)) for parts in (wholes, firsts, seconds)]
    # the halves' bias above the whole's, in units of the whole's
    longer = sizes[0] / 2 * (1 / sizes[1] + 1 / sizes[2]) - 1
    found: list[tuple[float, float]] = []
    slopes = []
    for a in weights:
        fitted = [_combined(a, mean, covariance, n) for (mean, covariance), n in zip(moments, sizes, strict=True)]
        full, first, second = (frechet_distance(generated=g, reference=reference) for g in fitted)
        found.append((full, ((first + second) / 2 - full) / longer))
        slopes.append(_slope(a, moments[0][1], counts, fitted[0], reference))
    influence = torch.zeros(len(places), max(counts), dtype=torch.float64)
    of_mean, of_covariance = map(torch.stack, zip(*slopes, strict=True))
    for p, (rows, mean) in enumerate(zip(wholes, moments[0][0], strict=True)):
        derivative = _derivative(rows - mean, of_mean, of_covariance)
        influence[:, : len(rows)] += weights[:, p, None] * _deviations(derivative, num_classes)
    values = torch.tensor(found, dtype=torch.float64)
    corrected = values[:, 0] - values[:, 1]
    return Surface(places, corrected, corrected + _multiplied(influence), values[:, 1])


def standard_error(features: Tensor, reference: Gaussian, num_classes: int) -> float:
    """Of the distance of one set of images: features (N, D), num_classes as in `surface`."""
    here = [Place(0.0)]
    return surface(here, [features], reference, here, num_classes=num_classes).noise


def period_of(count: int, num_classes: int) -> int:
    """The period of the labels of `count` images in which every class comes in turn, as `surface` wants it: 1 where
    they are too few to tell classes apart."""
    return num_classes if num_classes and count >= max(4, 2 * num_classes) else 1


def joined(parts: Sequence[Surface]) -> Surface:
    """Surfaces of the same images as one."""
    return Surface(
        [place for part in parts for place in part.places],
        torch.cat([part.values for part in parts]),
        torch.cat([part.draws for part in parts], dim=1),
        torch.cat([part.bias for part in parts]),
    )


def _halves(rows: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """With as many images of every class in both, but for one."""
    is_first = torch.arange(len(rows)) // num_classes % 2 == 0
    return rows[is_first], rows[~is_first]


def _moments(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Means (P, D) and covariances (P, D, D)."""
    means = [rows.mean(dim=0) for rows in features]
    centred = [rows - mean for rows, mean in zip(features, means, strict=True)]
    return torch.stack(means), torch.stack([rows.T @ rows / (len(rows) - 1) for rows in centred])


def _combined(a: Tensor, mean: Tensor, covariance: Tensor, count: int) -> Gaussian:
    """The fitted moments. With negative weights the sum of covariances may be none: then the nearest one."""
    fitted = (a @ covariance.flatten(1)).view_as(covariance[0])
    if (a < 0).any() and torch.linalg.cholesky_ex(fitted).info:
        values, vectors = torch.linalg.eigh(fitted)
        fitted = (vectors * values.clamp(min=0)) @ vectors.T
    return Gaussian(a @ mean, fitted, count)


def _slope(
    a: Tensor, covariances: Tensor, counts: Sequence[int], at: Gaussian, reference: Gaussian
) -> tuple[Tensor, Tensor]:
    """The distance's derivative in the fitted mean (D,) and covariance (D, D):

    d|m - m_r|^2 = 2 (m - m_r) dm;  d(tr S - 2 tr (R S)^1/2) = tr (1 - T) dS with T = U^T (U S U^T)^-1/2 U, R = U^T U.
    An eigenvalue of U S U^T that is less than its own error, which a sum with negative weights may have, counts as much
    as its error: the root is not steeper than that over what the images leave open.
    """
    upper, order = reference.factor
    root = torch.zeros(len(upper), len(order), dtype=torch.float64)
    root[:, order] = upper
    values, vectors = torch.linalg.eigh(root @ at.covariance @ root.T)
    axes = root.T @ vectors
    variances = ((covariances @ axes) * axes).sum(dim=1)  # (P, R)
    n = torch.tensor(counts, dtype=torch.float64)[:, None]
    values = torch.maximum(values, (a[:, None] * variances * (1 - 1 / n) * (2 / n).sqrt()).norm(dim=0))
    is_there = values > 1e-10 * (values.max() if len(values) else 0)
    steepness = torch.zeros_like(values)
    steepness[is_there] = values[is_there] ** -0.5
    return 2 * (at.mean - reference.mean), torch.eye(len(order), dtype=torch.float64) - (axes * steepness) @ axes.T


def _derivative(rows: Tensor, of_mean: Tensor, of_covariance: Tensor) -> Tensor:
    """(K, N): slope times what an image adds to the moments. rows: (N, D) less their mean; slopes at K places."""
    num_places, dim = of_mean.shape
    forms = of_covariance.permute(1, 0, 2).reshape(dim, num_places * dim)
    parts = []
    for part in rows.split(max(1, BLOCK // forms.shape[1])):
        parts.append(torch.einsum("nkd,nd->kn", (part @ forms).view(-1, num_places, dim), part) + of_mean @ part.T)
    return torch.cat(parts, dim=1)


def _deviations(derivative: Tensor, num_classes: int) -> Tensor:
    """(K, N) an image's share of the distance's error, with the variance that new images would give.

    derivative: (K, N) in every image's weight. Images of one class are exchangeable, those of different classes are not
    (labels are balanced): hence the class means come off first.
    """
    count = derivative.shape[1]
    labels = torch.arange(count) % num_classes
    own = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, torch.ones(count, dtype=torch.float64))
    sums = torch.zeros(len(derivative), num_classes, dtype=torch.float64).index_add_(1, labels, derivative)
    return (derivative - (sums / own)[:, labels]) * (own / (own - 1)).sqrt()[labels] / count


def _multiplied(influence: Tensor) -> Tensor:
    """(B, K) random sums of the images' influence (K, N): one number per image at all places."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_DRAWS, influence.shape[1], generator=generator, dtype=torch.float64) @ influence.T
