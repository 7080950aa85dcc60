"""From a [select] section to one point: by the search or by the fixed grid, over one or all snapshots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fid.frechet import Gaussian
from neon.evaluation.evaluate import Yardstick
from neon.search.found import Found
from neon.search.ledger import Ledger
from neon.search.options import Select
from neon.search.plan import Plan, first_places
from neon.search.points import Block, Point, Score, best, points_to_try
from neon.search.strategy import Search
from neon.search.surface import Place, period_of, standard_error, surface

LEAST_IMAGES = 120
MOST_COMPONENTS = 256
"""Features of more dimensions are searched on their leading principal components (of the reference): the covariance of
few images says nothing about the others, and a decision on 2,048 dimensions would take longer than the images."""
PER_FEATURE = 3
"""Images per feature that a choice needs. What the two halves leave of the bias, in percent of it, for 64 Gaussian
features and models that differ from the reference by 0.3 to 3 times the variance: up to 24 at 120 images, and different
for each model; up to 15 and mostly below 5 at 240."""
KEPT_BYTES = 1 << 28
"""Of the features of all points of a grid: up to that they are kept, and its points get error bars."""
NUM_SHOWN = 36
"""Images of every point that are kept as pictures."""


@dataclass(frozen=True)
class Measured:
    """An evaluated point of the search: its distance without the bias of few images, and its standard error. NaN: its
    images were no numbers."""

    point: Point
    num_images: int
    value: float
    error: float


@dataclass(frozen=True)
class Choice:
    """The point that was chosen and everything that was looked at."""

    point: Point
    base_cfg_scale: float | None
    """The guidance that suits the base best."""
    metric: str
    """Of `scores`, with the number of images of their block."""
    scores: Sequence[Score]
    """Every point on its first images."""
    found: Found | None = None
    """Of the search; None for a grid."""
    measured: Sequence[Measured] = ()
    """The search's points with all of their images."""
    plan: Plan | None = None
    components: int | None = None
    """Principal components that the search's distances are on; None: all dimensions."""
    features: Mapping[Point, Tensor] = field(default_factory=dict, repr=False)
    """(N, D) of the search's points, for what else is measured along the curve."""
    errors: Mapping[Point, float] = field(default_factory=dict)
    """Standard errors of a grid's points; none where features were not kept."""


def by_grid(
    ledger: Ledger, config: Select, snapshots: Sequence[str], yardstick: Yardstick, *, num_classes: int
) -> Choice:
    """Every (snapshot, w, cfg_scale) on the whole block, and a random direction; the lowest distance of w >= 0."""
    block = Block(labels=config.labels, first_seed=config.first_seed, num_images=config.num_images)
    metric = yardstick.headline(config.num_images)
    points = points_to_try(snapshots, config.w, config.cfg_scale)
    ledger.expect(len(points) + 1)
    reference, extractor = yardstick.reference, yardstick.extractor
    is_kept = reference is not None and 4 * config.num_images * extractor.dim * (len(points) + 1) <= KEPT_BYTES
    period = period_of(config.num_images, num_classes if config.labels == "balanced" else 1)
    errors: dict[Point, float] = {}

    def look(point: Point) -> Score:
        if not is_kept or reference is None or config.num_images < 4:
            return ledger.score(point, block)
        score, kept = ledger.score_with_features(point, block, make_again=False)
        if extractor.name in kept:
            errors[point] = standard_error(kept[extractor.name], reference, period)
        return score

    scores = [look(point) for point in points]
    winner = best([score for score in scores if score.point.w >= 0], metric)
    base = best([score for score in scores if score.point.w == 0], metric)
    control = look(random_control(winner.point))
    scores.append(control)
    return Choice(winner.point, base.point.cfg_scale, metric, scores, errors=errors)


def random_control(point: Point) -> Point:
    """A random direction at the chosen point's step; at w = 0 there is no step, so at w = 1."""
    return Point(w=point.w or 1.0, snapshot=point.snapshot, cfg_scale=point.cfg_scale, direction="random")


def by_search(
    ledger: Ledger,
    config: Select,
    steps: Mapping[str, float],
    yardstick: Yardstick,
    *,
    num_classes: int,
    report_images: int,
) -> Choice:
    """Search on the last snapshot, then look at the others where w moves the weights as far, and search again on one
    that is better there by more than two standard errors.

    steps: snapshot -> |theta_syn - theta_base|. A snapshot's best w is inversely proportional to it and its best
        distance hardly depends on it (paper, section 3.1): one look is enough to drop it.
    """
    if yardstick.reference is None:
        raise ValueError(f"strategy = 'search' needs reference statistics of {yardstick.extractor.name}; it has none")
    dim = yardstick.extractor.dim
    plan = plan_of(config, len(steps), min(dim, MOST_COMPONENTS), num_classes, report_images)
    reference, basis = leading(yardstick.reference)
    *others, last = steps
    looked = Looked(ledger, config, yardstick.extractor.name, last, basis, num_classes)
    found = Search(plan, reference, looked.at(last), ledger.tell).run()
    snapshot = last
    if others and found.reason != "flat":
        better = _better_snapshot(found, plan, steps, looked, reference)
        left = plan.budget_images - looked.images_spent
        if better is not None and left >= 3 * plan.start_images:
            scale = steps[last] / steps[better]
            ends = sorted((0.5 * found.place.w * scale, 1.5 * found.place.w * scale))
            again = replace(plan, w=(ends[0], ends[1]), budget_images=left)
            found, snapshot = Search(again, reference, looked.at(better), ledger.tell).run(), better
            plan = replace(again, budget_images=plan.budget_images)
    found = replace(found, images_spent=looked.images_spent)
    is_guided = config.cfg_scale is not None
    point = looked.point(snapshot, found.place)
    base_cfg = found.base.cfg_scale if is_guided else None
    metric = yardstick.headline(plan.start_images)
    measured = looked.measured(plan, reference)
    components = None if basis is None else MOST_COMPONENTS
    return Choice(point, base_cfg, metric, looked.first_scores, found, measured, plan, components, looked.all_features)


def plan_of(config: Select, num_snapshots: int, dim: int, num_classes: int, report_images: int) -> Plan:
    """The search that a [select] section asks for. Raises ValueError if the budget does not pay for its first
    points."""
    is_balanced = config.labels == "balanced" and num_classes > 0 and config.num_images >= 2 * num_classes
    period = num_classes if is_balanced else 1
    start = config.start_images or max(LEAST_IMAGES, dim, 2 * period)
    start = min(-(-start // period) * period, config.num_images)
    if start < 4:
        raise ValueError(
            f"select.num_images = {config.num_images}: the search needs at least 4 images; make the block larger, or "
            "set select.strategy = 'grid'"
        )
    cfgs = None if config.cfg_scale is None else (min(config.cfg_scale), max(config.cfg_scale))
    snapshots = num_snapshots if config.snapshots == "all" else 1
    values = len({0.0, -1.0, *config.w}) * len(config.cfg_scale or (None,)) * snapshots + 1
    plan = Plan(
        w=(min(-1.0, *config.w), max(config.w) if max(config.w) > 0 else 1.0),
        cfg_scale=cfgs,
        start_images=start,
        most_images=config.num_images,
        budget_images=config.budget_images or 0,
        report_images=report_images,
        decisive_images=PER_FEATURE * dim,
        num_classes=period,
    )
    least = start * len(first_places(plan))
    if config.budget_images is None:
        return replace(plan, budget_images=max(values * config.num_images // 3, least + 2 * start))
    if config.budget_images < least:
        raise ValueError(
            f"select.budget_images = {config.budget_images}: the first points take {least} images "
            f"({start} each; select.start_images)"
        )
    return plan


def leading(reference: Gaussian) -> tuple[Gaussian, Tensor | None]:
    """The reference on its MOST_COMPONENTS leading principal components, and these (D, K); None: it has no more."""
    if len(reference.mean) <= MOST_COMPONENTS:
        return reference, None
    basis = torch.linalg.eigh(reference.covariance).eigenvectors[:, -MOST_COMPONENTS:]
    return Gaussian(reference.mean @ basis, basis.T @ reference.covariance @ basis, reference.count), basis


class Looked:
    """What the search has seen: the ledger's scores and features, by point."""

    def __init__(
        self, ledger: Ledger, config: Select, extractor: str, last: str, basis: Tensor | None, num_classes: int
    ):
        self._ledger, self._config, self._extractor, self._last, self._basis = ledger, config, extractor, last, basis
        self._num_classes = num_classes if config.labels == "balanced" else 0
        self.all_features: dict[Point, Tensor] = {}
        self.first_scores: list[Score] = []
        self.images_spent = 0

    def point(self, snapshot: str, place: Place) -> Point:
        cfg_scale = None if self._config.cfg_scale is None else place.cfg_scale
        return Point(w=place.w, snapshot=snapshot if place.w else self._last, cfg_scale=cfg_scale)  # w = 0: the base

    def at(self, snapshot: str) -> Callable[[Place, range], Tensor | None]:
        """What `Search` asks, for one snapshot."""
        return lambda place, images: self.features(self.point(snapshot, place), images)

    def features(self, point: Point, images: range) -> Tensor | None:
        """Those of a point's images, on the components; None if they were no numbers. What was seen is not asked for
        again."""
        have = self.all_features.get(point)
        if have is not None and not len(have):
            return None
        if have is not None and len(have) >= images.stop:
            return self._on_components(have[images.start : images.stop])
        config = self._config
        block = Block(
            labels=config.labels,
            first_seed=config.first_seed + images.start,
            num_images=len(images),
            num_shown=0 if images.start else min(NUM_SHOWN, len(images)),
            first_label=images.start % self._num_classes if self._num_classes else 0,
        )
        score, features = self._ledger.score_with_features(point, block)
        if images.start == 0 and all(score.key != other.key for other in self.first_scores):
            self.first_scores.append(score)
        self.images_spent += len(images)
        if score.failed is not None:
            self.all_features[point] = torch.empty(0, 0)
            return None
        rows = features[self._extractor]
        self.all_features[point] = rows if have is None else torch.cat([have[: images.start], rows])
        return self._on_components(rows)

    def _on_components(self, rows: Tensor) -> Tensor:
        return rows if self._basis is None else rows.double() @ self._basis

    def measured(self, plan: Plan, reference: Gaussian) -> list[Measured]:
        """Every point with its distance on all of its images, in the order of (snapshot, cfg_scale, w)."""
        found = []
        for point, rows in self.all_features.items():
            value = error = float("nan")
            if len(rows):
                here = [Place(0.0)]
                own = surface(here, self._on_components(rows)[None], reference, here, num_classes=plan.num_classes)
                value, error = float(own.values[0]), own.noise
            found.append(Measured(point, len(rows), value, error))
        return sorted(found, key=lambda m: (m.point.snapshot, m.point.cfg_scale or 0.0, m.point.w))


def _better_snapshot(
    found: Found, plan: Plan, steps: Mapping[str, float], looked: Looked, reference: Gaussian
) -> str | None:
    """The snapshot that is better than the last one at the same length of step, by more than two standard errors."""
    *others, last = steps
    images = range(plan.start_images)
    here = looked.features(looked.point(last, found.place), images)
    best_name, best_score = None, 0.0
    for name in others:
        if looked.images_spent + plan.start_images > plan.budget_images:
            break
        w = round(found.place.w * steps[last] / steps[name], 4)
        there = looked.features(looked.point(name, replace(found.place, w=w)), images)
        if here is None or there is None:
            continue
        pair = [Place(0.0), Place(1.0)]  # two models as two places: the same images, so the difference is sharp
        both = surface(pair, torch.stack([here, there]), reference, pair, num_classes=plan.num_classes)
        difference, error = both.difference(1, 0)
        if difference < -2 * error and difference < best_score:
            best_name, best_score = name, difference
    return best_name
