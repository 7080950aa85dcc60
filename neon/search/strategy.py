"""Where the search looks next: few images everywhere, more where the decision needs them, and why it stops.

A pure function of the features that it is given: the same features lead to the same points and the same choice, so a
killed search, started again on the ledger of its points, goes the same way.
"""

# N images, D features, P points

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fid.frechet import Gaussian
from neon.search.found import Found, Reason
from neon.search.plan import Plan, around, first_places, places_around, spaced
from neon.search.surface import Place, Surface, joined, polynomial_weights, surface

NEAR = 0.08
"""Two places closer than this share of the range count as one, until the fit has been found wrong there."""
NEAREST = 0.01
"""The least distance of two places."""
SURE, SURE_ON_PLANE = 1.25, 0.5
"""A search ends when the gain that is still expected is below so many standard errors of the difference that the
report's images would show for it. What is missed on a line is the square of a normal number z times the expected gain,
its error |z| times the mean error over 0.8: at 1.25 the choice lies within two standard errors of the best place in 95
of 100 cases. On a plane it may be missed in two directions, by a fit with as few points per term as it can have."""
EDGE_STEPS = 3
"""How often an optimum at the edge extends the range on that side, by half its width each time."""


Evaluate = Callable[[Place, range], Tensor | None]
"""Features (len(images), D) of the images of the selection block at a place; None: some were not finite."""


@dataclass
class Search:
    """One search; `run` asks `evaluate` for features until it can choose."""

    plan: Plan
    reference: Gaussian
    evaluate: Evaluate
    tell: Callable[[str], None] = lambda text: None
    """Called with a line for the person who waits."""
    _features: dict[Place, Tensor] = field(default_factory=dict)
    _failed: list[Place] = field(default_factory=list)
    _order: list[Place] = field(default_factory=list)
    _spent: int = 0
    _owns: dict[tuple[Place, int], Surface] = field(default_factory=dict)

    def run(self) -> Found:
        found = self._run(first_places(self.plan))
        return self._closer(found) if self.plan.is_plane and found.reason in ("gain", "images") else found

    def _closer(self, whole: Found) -> Found:
        """The choice made again with places around it, where the fit then trusts them most: what a quadratic surface
        misses between places as far apart as the first ones is in no error bar. Where the guidance then lies at the
        side of what was looked at, around the new choice once more."""
        assert self.plan.cfg_scale is not None
        ws = [place.w for place in whole.whole.places]
        found, (least, most) = whole, self.plan.cfg_scale
        for _ in range(EDGE_STEPS):
            low, high = around(found.place.w, min(ws), max(ws))
            small, large = around(found.place.cfg_scale, least, most)
            plan = replace(self.plan, w=(low, high), cfg_scale=(small, large), start_images=found.num_images)
            part = Search(
                plan, self.reference, self.evaluate, self.tell, self._features, self._failed, self._order, self._spent
            )
            wanted = [p for p in places_around(plan) if part._distance(p, low, high) > NEAR]
            if self._spent + part._cost(wanted, found.num_images) > self.plan.budget_images:
                found = replace(found, reason="budget")
                break
            self.tell(f"looking closer: w in {low:g} .. {high:g}, guidance in {small:g} .. {large:g}")
            found = part._run(wanted, may_be_flat=False)
            self._spent = part._spent
            is_at_side = found.place.cfg_scale in (small, large) and least < found.place.cfg_scale < most
            if not is_at_side or found.reason == "budget":
                break
        return replace(found, base=whole.base, whole=self._fitted(min(ws), max(ws), whole.num_images)[0])

    def _run(self, wanted: Sequence[Place], *, may_be_flat: bool = True) -> Found:
        low, high = self.plan.w
        count, near, edge_steps = self.plan.start_images, NEAR, {-1: 0, 1: 0}
        predicted, is_verified = math.nan, False
        while True:
            for place in wanted:
                self._measure(place, count)
            low, high = self._inside(low, high)
            before = low, high
            fit, fine = self._fitted(low, high, count)
            best, noise = fine.places[fine.best], self._report_noise(fine, count)
            if not math.isnan(predicted) and wanted[0] in self._features:
                own = self._own(wanted[0], count)
                # many points make the fit of a plane surer than one of them can be
                noise_of_own = own.noise if self.plan.is_plane else fine.noise
                is_verified = abs(float(own.values[0]) - predicted) <= noise_of_own
                near = near if is_verified else near / 2
            predicted, next_count, side = math.nan, count, self._edge(best, low, high)
            noise_of_report = fine.noise * math.sqrt(count / self.plan.report_images)
            is_flat = _is_flat(fit, noise_of_report) if may_be_flat else "no"
            if is_flat == "certainly":
                return self._found(fit, fine, "flat", count)
            if is_flat == "so far":
                next_count, wanted = min(2 * count, self.plan.most_images), self._points(count)
            elif side and edge_steps[side] < EDGE_STEPS:
                edge_steps[side] += 1
                width = (high - low) / 2
                low, high = (low - width, high) if side < 0 else (low, high + width)
                wanted = [Place(low if side < 0 else high, best.cfg_scale)]
            elif (unseen := self._unseen(fine, fit, low, high, near, is_verified, count)) is not None:
                wanted, predicted, is_verified = [unseen[0]], unseen[1], False
            elif (is_open := fine.expected_gain > noise) and count == self.plan.most_images:
                return self._found(fit, fine, "images", count)
            elif is_open or count < min(self.plan.decisive_images, self.plan.most_images):
                next_count, wanted = self._more(count, fine.expected_gain, noise), self._deciding_points(fine, count)
            else:
                return self._found(fit, fine, "edge" if side else "gain", count)
            is_affordable = self._spent + self._cost(wanted, next_count) <= self.plan.budget_images
            if is_flat == "so far" and (next_count == count or not is_affordable):
                return self._found(fit, fine, "flat", count)
            if not is_affordable:
                return self._found(fit, fine, "budget", count)
            if (low, high) != before:
                self.tell(
                    f"the lowest distance lies at the edge, w = {best.w:g}: w is now searched in {low:g} .. {high:g}"
                )
            count = next_count

    def _measure(self, place: Place, count: int) -> None:
        """Bring a place to `count` images."""
        have = self._features.get(place)
        start = 0 if have is None else len(have)
        if place in self._failed or start >= count:
            return
        if place not in self._order:
            self._order.append(place)
        self._spent += count - start
        more = self.evaluate(place, range(start, count))
        if more is None:
            self._failed.append(place)
            self._features.pop(place, None)
        else:
            self._features[place] = more if have is None else torch.cat([have, more])

    def _cost(self, wanted: Sequence[Place], count: int) -> int:
        return sum(count - len(self._features.get(place, ())) for place in wanted)

    def _inside(self, low: float, high: float) -> tuple[float, float]:
        """The range without what lies beyond places whose images were not finite."""
        good = [place.w for place in self._features]
        for bad in (place.w for place in self._failed):
            if bad > max(good, default=0.0):
                high = min(high, (bad + max(good, default=0.0)) / 2)
            elif bad < min(good, default=0.0):
                low = max(low, (bad + min(good, default=0.0)) / 2)
        return low, high

    def _points(self, count: int) -> list[Place]:
        """Those that are fitted. On a line, the ones with as many images; on a plane all: the few that have most would
        not determine a surface beyond where they lie together."""
        least = 0 if self.plan.is_plane else count
        return sorted(place for place, rows in self._features.items() if len(rows) >= least)

    def _surface(self, points: Sequence[Place], places: Sequence[Place], count: int, trust: Tensor | None) -> Surface:
        features = [self._features[p][:count] for p in points]
        return surface(points, features, self.reference, places, num_classes=self.plan.num_classes, trust=trust)

    def _own(self, place: Place, count: int) -> Surface:
        """The distance at an evaluated place by its own images alone."""
        key = place, min(count, len(self._features[place]))
        if key not in self._owns:
            self._owns[key] = self._surface([place], [place], count, None)
        return self._owns[key]

    def _value(self, place: Place, count: int) -> float:
        return float(self._own(place, count).values[0])

    def _fitted(self, low: float, high: float, count: int) -> tuple[Surface, Surface]:
        """The distance over the whole range, and there and finely around its minimum: where the images leave much open,
        the minimum may lie anywhere."""
        points = self._points(count)
        if not points:
            raise ValueError("no point gave finite images, not even the base (w = 0): check the base's samples first")
        trust, cfgs = self._trust(count), self.plan.cfg_scale
        scales = [0.0] if cfgs is None else spaced(*cfgs, 7)
        ws = spaced(low, high, 21 if len(scales) == 1 else 13)
        fit = self._surface(points, [Place(w, c) for c in scales for w in ws], count, trust)
        best, step = fit.places[fit.best], ws[1] - ws[0]
        near_ws = spaced(max(low, best.w - step), min(high, best.w + step), 21 if len(scales) == 1 else 9)
        near_scales = scales
        if cfgs is not None and len(scales) > 1:
            step = scales[1] - scales[0]
            near_scales = spaced(max(cfgs[0], best.cfg_scale - step), min(cfgs[1], best.cfg_scale + step), 5)
        places = [Place(w, c) for c in near_scales for w in near_ws]
        return fit, joined([self._surface(points, places, count, trust), fit])

    def _trust(self, count: int) -> Tensor:
        """Of every point: far from the optimum a misfit does not matter, and few images say little."""
        return self._shares(count) * self._nearness(count)

    def _nearness(self, count: int) -> Tensor:
        """1 for the point of the lowest distance, less for others, the less the larger theirs is."""
        own = [self._own(p, count) for p in self._points(count)]
        values = torch.tensor([float(s.values[0]) for s in own], dtype=torch.float64)
        lowest = int(values.argmin())
        scale = max(float(values[lowest]), own[lowest].noise, 1e-12)  # few images can make the distance negative
        return (1 + (values - values[lowest]) / scale) ** -2

    def _shares(self, count: int) -> Tensor:
        """Of every point: which share of `count` images it has."""
        counts = [min(len(self._features[p]), count) for p in self._points(count)]
        return torch.tensor(counts, dtype=torch.float64) / count

    def _edge(self, best: Place, low: float, high: float) -> int:
        """-1 or 1 if the optimum lies at an end of the range that may be extended."""
        margin = 0.02 * (high - low)
        if best.w >= high - margin and not any(bad.w > high - margin for bad in self._failed):
            return 1
        return -1 if best.w <= low + margin and not any(bad.w < low + margin for bad in self._failed) else 0

    def _unseen(
        self, fine: Surface, fit: Surface, low: float, high: float, near: float, is_verified: bool, count: int
    ) -> tuple[Place, float] | None:
        """The place to look at next with what the fit says there: the optimum, unless a point lies there already that
        is as low within the noise. Then, until a prediction has come true, the lowest place that no point is near."""
        noise = self._report_noise(fine, count)
        best = fine.places[fine.best]
        predicted = float(fine.values[fine.best])
        lowest = min(self._value(p, count) for p in self._points(count))
        if self._distance(best, low, high) > (near if predicted > lowest - noise else NEAREST):
            return best, predicted
        if is_verified:
            return None
        order = fit.values.argsort().tolist()
        free = next((i for i in order if self._distance(fit.places[i], low, high) > near), None)
        return None if free is None else (fit.places[free], float(fit.values[free]))

    def _is_refuted(self, place: Place, low: float, high: float, count: int) -> bool:
        """Whether a point near the place, of too few images to be in the fit, shows that the fit is wrong there: points
        that lie together may have a parabola with a second, lower minimum far away."""
        for other, rows in self._features.items():
            if len(rows) < count and self._distance(place, low, high, [other]) <= NEAR:
                own = self._own(other, len(rows))
                fitted = self._surface(self._points(count), [other], count, self._trust(count))
                if float(own.values[0]) - 3 * own.noise > float(fitted.values[0]):
                    return True
        return False

    def _distance(self, place: Place, low: float, high: float, points: Sequence[Place] | None = None) -> float:
        """To the nearest point (of all that were evaluated), as a share of the ranges."""
        cfgs = self.plan.cfg_scale
        width = 1.0 if cfgs is None else 2 * (cfgs[1] - cfgs[0]) or 1.0
        distances = (
            math.hypot((place.w - other.w) / (high - low), (place.cfg_scale - other.cfg_scale) / width)
            for other in (points or [*self._features, *self._failed])
        )
        return min(distances, default=math.inf)

    def _deciding_points(self, fine: Surface, count: int) -> list[Place]:
        """The points that get more images: on a line the four lowest, which a parabola rests on; on a plane the eight
        of which more images take the most off the error of the gain that is still expected."""
        points = self._points(count)
        own = [self._own(p, count) for p in points]
        if not self.plan.is_plane:
            return [points[i] for i in torch.stack([s.values[0] for s in own]).argsort(stable=True).tolist()[:4]]
        lowest, times = fine.draws.argmin(dim=1).unique(return_counts=True)
        places = [fine.places[i] for i in (fine.best, *lowest.tolist())]
        weights = polynomial_weights(points, places, self._trust(count))
        share = (times[:, None] * (weights[1:] - weights[0]).square()).sum(dim=0)  # of a point's variance in the gain's
        variance_per_image = torch.tensor([s.noise**2 for s in own], dtype=torch.float64) / self._shares(count)
        return [points[i] for i in (share * variance_per_image).argsort(descending=True, stable=True).tolist()[:8]]

    def _more(self, count: int, gain: float, noise: float) -> int:
        """Images of every point at which the gain should fall below the noise, twice as many at most: the gain falls
        with their number, the noise with its square root."""
        enough = max(self.plan.decisive_images, count * (gain / noise) ** 2 if noise > 0 else math.inf, count + 1)
        most = min(2 * count, self.plan.most_images)
        return most if enough >= most else min(most, _whole_periods(enough, self.plan.num_classes))

    def _report_noise(self, fine: Surface, count: int) -> float:
        """What the report's images could show of the gain that is still expected: `SURE` standard errors of it."""
        nearness = self._nearness(count)
        images = count * float((self._shares(count) * nearness).sum() / nearness.sum())  # of a point of the fit
        sure = SURE_ON_PLANE if self.plan.is_plane else SURE
        return sure * fine.gain_error * math.sqrt(images / self.plan.report_images)

    def _found(self, fit: Surface, final: Surface, reason: Reason, count: int) -> Found:
        place, cfgs = final.places[final.best], self.plan.cfg_scale
        scales = [0.0] if cfgs is None else spaced(*cfgs, 25)
        bases = self._surface(self._points(count), [Place(0.0, c) for c in scales], count, self._trust(count))
        base = bases.places[bases.best]
        ws = [p.w for p in fit.places]
        if reason == "flat":
            place = base
        elif self._is_refuted(place, min(ws), max(ws), count):
            place = min(self._points(count), key=lambda p: self._value(p, count))
        return Found(
            place,
            base,
            reason,
            final,
            fit,
            tuple(self._order),
            tuple(self._failed),
            count,
            self._spent,
            final.expected_gain,
            self._report_noise(final, count),
            reason != "flat" and self._edge(place, min(ws), max(ws)) != 0,
        )


def _is_flat(fit: Surface, noise: float) -> Literal["no", "so far", "certainly"]:
    """Whether at the best guidance no two places over w are three standard errors apart; certainly, where that is less
    than `noise`, the standard error of the report's value."""
    scale = fit.places[fit.best].cfg_scale
    differences = [fit.difference(i, fit.best) for i, place in enumerate(fit.places) if place.cfg_scale == scale]
    if any(difference > max(3 * error, 1e-9) for difference, error in differences):
        return "no"
    difference, error = max(differences)
    return "certainly" if 3 * error <= noise or difference <= 1e-9 else "so far"


def _whole_periods(count: float, num_classes: int) -> int:
    return math.ceil(count / num_classes) * num_classes
