"""The search for (w, cfg_scale) against closed forms: models of features whose distance is known at every place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from fid.frechet import Gaussian, frechet_distance
from neon.report.result import Difference, verdict, why_it_ended
from neon.search.choose import Choice
from neon.search.found import Found
from neon.search.plan import Plan, first_places
from neon.search.points import Point, Score
from neon.search.strategy import Search, _is_flat
from neon.search.surface import Place, Surface, _slope, polynomial_weights, surface

REFERENCE = Gaussian(torch.zeros(3), torch.eye(3))


def unit_noise(num_images: int, seed: int = 0) -> Tensor:
    return torch.randn(num_images, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_noise(num_images: int, seed: int = 0) -> Tensor:
    """(N, 3) with mean 0 and covariance 1 to rounding: no noise is left in the distance."""
    raw = unit_noise(num_images, seed)
    raw = raw - raw.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(raw.T)), raw.T, upper=False).T


def model(best_w: float, best_cfg: float = 0.0, *, curve: float = 1.0) -> Callable[[Place], tuple[Tensor, float]]:
    """Mean and scale of the features: the distance is |mean|^2 + 3 (scale - 1)^2, least at the best place."""

    def at(place: Place) -> tuple[Tensor, float]:
        offset, shift = curve * (place.w - best_w), 0.5 * (place.cfg_scale - best_cfg)
        return torch.tensor([0.4, offset, shift], dtype=torch.float64), math.sqrt(1.2 + 0.05 * offset**2)

    return at


def distance(mean: Tensor, scale: float) -> float:
    return float(mean.square().sum()) + 3 * (scale - 1) ** 2


def searched(plan: Plan, at: Callable[[Place], tuple[Tensor, float]], noise: Tensor, **broken: float) -> Search:
    """broken: `above` or `below`, the w beyond which images are not finite."""

    def evaluate(place: Place, images: range) -> Tensor | None:
        if place.w > broken.get("above", math.inf) or place.w < broken.get("below", -math.inf):
            return None
        mean, scale = at(place)
        return mean + scale * noise[images.start : images.stop]

    return Search(plan, REFERENCE, evaluate)


def plan(**changed: object) -> Plan:
    settings: dict = {"w": (-1.0, 3.0), "cfg_scale": None, "start_images": 200, "most_images": 20_000}
    return Plan(**{**settings, "budget_images": 20_000, "report_images": 2_000, **changed})


@pytest.mark.parametrize("cfg_scale", [None, (1.0, 4.0)])
def test_the_first_places_determine_a_quadratic(cfg_scale):
    """A quadratic in w, or in (w, cfg_scale), is reproduced everywhere, and constants whatever the trust."""
    points = first_places(plan(cfg_scale=cfg_scale))
    value = lambda p: 3 - p.w + 2 * p.w**2 + 0.3 * p.cfg_scale**2 - p.w * p.cfg_scale  # noqa: E731
    places = [Place(w, c) for w in (-0.7, 0.2, 2.9) for c in ((0.0,) if cfg_scale is None else (1.3, 3.8))]
    trust = torch.linspace(0.1, 1, len(points), dtype=torch.float64)
    weights = polynomial_weights(points, places, trust)
    at_points = torch.tensor([value(p) for p in points], dtype=torch.float64)
    assert (weights @ at_points).tolist() == pytest.approx([value(p) for p in places])
    assert weights.sum(1).tolist() == pytest.approx([1.0] * len(places))


def test_a_misfit_counts_where_it_is_trusted():
    """Five points of a parabola and one far off it: with little trust in that one the parabola stands."""
    points = [Place(w) for w in (-1.0, 0.0, 0.5, 1.0, 2.0, 3.0)]
    values = torch.tensor([p.w**2 for p in points], dtype=torch.float64)
    values[-1] += 100
    trust = torch.tensor([1, 1, 1, 1, 1, 1e-9], dtype=torch.float64)
    found = polynomial_weights(points, [Place(0.75)], trust) @ values
    assert float(found) == pytest.approx(0.75**2, abs=1e-4)
    assert abs(float(polynomial_weights(points, [Place(0.75)], torch.ones(6).double()) @ values) - 0.75**2) > 1


def test_the_distance_is_read_off_the_moments():
    """Mean and covariance are polynomials of degree 2 here, so three points give the distance at every w exactly."""
    at, noise = model(1.3), exact_noise(500)
    points, places = [Place(w) for w in (-1.0, 0.0, 3.0)], [Place(w) for w in (-0.5, 1.3, 2.0)]
    features = torch.stack([mean + scale * noise for mean, scale in map(at, points)])
    found = surface(points, features, REFERENCE, places)
    assert (found.values + found.bias).tolist() == pytest.approx([distance(*at(p)) for p in places], abs=1e-9)
    assert found.best == 1


def test_the_bias_of_few_images_is_taken_off():
    """Over many draws: the raw distance of 40 images is too large, of that at most a fifth is left."""
    at, places = model(1.0), [Place(0.0), Place(1.0)]
    raw, corrected = [], []
    for seed in range(300):
        features = torch.stack([mean + scale * unit_noise(40, seed) for mean, scale in map(at, places)])
        found = surface(places, features, REFERENCE, places)
        raw.append(found.values + found.bias)
        corrected.append(found.values)
    truth = torch.tensor([distance(*at(p)) for p in places], dtype=torch.float64)
    bias, left = torch.stack(raw).mean(0) - truth, torch.stack(corrected).mean(0) - truth
    assert (bias > 0.05).all()
    assert (left.abs() < 0.2 * bias).all()


def test_a_reference_that_is_one_image_over_and_over_has_a_distance_with_an_error():
    """Its covariance is zero: the distance is |m - m_r|^2 + tr S, and so is its slope."""
    constant = Gaussian(torch.zeros(3), torch.zeros(3, 3))
    offset = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    values, errors = [], []
    for seed in range(200):
        found = surface([Place(0.0)], [offset + unit_noise(400, seed)], constant, [Place(0.0)])
        values.append(found.values[0])
        errors.append(found.noise)
    assert float(torch.stack(values).mean()) == pytest.approx(4 + 3, rel=0.01)
    assert sum(errors) / 200 == pytest.approx(float(torch.stack(values).std()), rel=0.15)


def test_the_slope_is_the_change_of_the_distance():
    """Against differences of the distance itself, in the mean and in the covariance: their signs too."""
    generator = torch.Generator().manual_seed(0)
    a, b, move = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    reference, covariance = Gaussian(torch.zeros(4), a @ a.T), b @ b.T + torch.eye(4, dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    at, one = Gaussian(mean, covariance, 1000), torch.ones(1, dtype=torch.float64)
    of_mean, of_covariance = _slope(one, covariance[None], [1000], at, reference)
    step, moves = 1e-5, (move[0], move + move.T)
    for slope, (d_mean, d_covariance) in ((of_mean, (moves[0], 0)), (of_covariance, (0, moves[1]))):
        high, low = (
            frechet_distance(
                generated=Gaussian(mean + sign * step * d_mean, covariance + sign * step * d_covariance),
                reference=reference,
            )
            for sign in (1, -1)
        )
        change = d_mean if slope.ndim == 1 else d_covariance
        assert float((slope * change).sum()) == pytest.approx((high - low) / (2 * step), rel=1e-4)


def test_few_images_of_many_features_give_a_distance_everywhere():
    """Between the points a sum of covariances with negative weights need not be a covariance: it is made one."""
    points, places = [Place(w) for w in (-1.0, 0.0, 3.0)], [Place(w) for w in (-0.5, 1.0, 2.0)]
    rows = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = surface(points, rows, Gaussian(torch.zeros(40), torch.eye(40)), places)
    assert found.values.isfinite().all()
    assert (found.draws.std(dim=0) > 0).all()


@pytest.mark.parametrize("counts", [(300, 300), (100, 300)])
@pytest.mark.parametrize("num_classes", [1, 5])
def test_the_error_bars_are_those_of_other_images(num_classes, counts):
    """Standard deviation over 200 sets of images of a value, and of a difference between two places, which need not
    have as many of the images."""
    at, places = model(1.0), [Place(0.0), Place(1.0)]
    offsets = torch.arange(300) % num_classes  # classes whose means differ: balanced labels add no noise
    values, errors, differences, difference_errors = [], [], [], []
    for seed in range(200):
        noise = unit_noise(300, seed) + offsets[:, None]
        features = [mean + scale * noise[:n] for (mean, scale), n in zip(map(at, places), counts, strict=True)]
        found = surface(places, features, REFERENCE, places, num_classes=num_classes)
        difference, error = found.difference(0, 1)
        values.append(found.values[1])
        errors.append(found.draws[:, 1].std())
        differences.append(difference)
        difference_errors.append(error)
    assert float(torch.stack(errors).mean()) == pytest.approx(float(torch.stack(values).std()), rel=0.15)
    assert sum(difference_errors) / 200 == pytest.approx(float(torch.tensor(differences).std()), rel=0.15)


def test_a_variance_that_is_smaller_than_its_own_error_does_not_blow_the_error_bar_up():
    """Beyond the points the fitted variance is 1 - 3 + 3 * 0.666667 = 1e-6: the slope of its root is 500. Over 300 sets
    of images the distance there has a standard deviation of 0.49."""
    scales = (1.0, 1.0, math.sqrt(0.666667))
    features = [scale * exact_noise(200, seed) for seed, scale in enumerate(scales)]
    points = [Place(0.0), Place(1.0), Place(2.0)]
    found = surface(points, features, REFERENCE, [Place(3.0)])
    assert float(found.values + found.bias) == pytest.approx(3.0, abs=0.01)
    assert 0.3 < found.noise < 0.7


@pytest.mark.parametrize("best_w", [-0.6, 0.0, 0.4, 1.7])
def test_the_search_finds_the_minimum_with_few_images(best_w):
    noise = unit_noise(20_000)
    found = searched(plan(), model(best_w), noise).run()
    truth, least = distance(*model(best_w)(found.place)), distance(*model(best_w)(Place(best_w)))
    assert found.reason == "gain"
    assert truth - least < 3 * found.noise
    # 1.25 errors at N/4 of N images: the optimum is off by s |z| / sqrt(n), its gain by that squared, the error on the
    # report by 2 s / sqrt(N) times it, and 0.8 is the mean of |z|
    assert found.num_images == pytest.approx(plan().report_images / 4, rel=0.15)
    assert found.images_spent <= 5.5 * plan().report_images / 4
    assert found.gain <= found.noise


def test_guidance_is_searched_together_with_w():
    at = model(0.8, best_cfg=2.2)
    found = searched(plan(cfg_scale=(1.0, 4.0)), at, unit_noise(20_000)).run()
    best = distance(*at(Place(0.8, 2.2)))
    assert distance(*at(found.place)) - best < 0.02 * best
    assert found.images_spent <= 13 * 14 * plan().report_images / 20


def bent(best: Place) -> Callable[[Place], tuple[Tensor, float]]:
    """The features' mean is an exponential of w and a logarithm of the guidance: no quadratic surface is right."""

    def at(place: Place) -> tuple[Tensor, float]:
        shift = math.log(place.cfg_scale / best.cfg_scale)
        return torch.tensor([0.4, math.exp(place.w - best.w) - 1, shift], dtype=torch.float64), 1.1

    return at


@pytest.mark.parametrize("best", [Place(0.8, 2.2), Place(0.3, 1.5), Place(0.8, 3.9)])
def test_a_closer_look_at_a_plane_mends_what_one_quadratic_surface_misses(best):
    at, exact = bent(best), exact_noise(200)
    whole = plan(cfg_scale=(1.0, 4.0), most_images=200)

    def missed(found: Found) -> float:
        return distance(*at(found.place)) - distance(*at(best))

    far = searched(whole, at, exact)._run(first_places(whole))
    near = searched(whole, at, exact).run()
    assert missed(far) > 0.001
    assert missed(near) < missed(far) / 2
    assert near.images_spent <= 2 * 9 * 200
    assert (near.base, near.whole.places) == (far.base, far.whole.places)


def test_a_closer_look_moves_on_where_the_guidance_lies_at_its_side():
    at, exact = bent(Place(0.8, 3.5)), exact_noise(200)
    search = searched(plan(cfg_scale=(1.0, 4.0), most_images=200), at, exact)
    found = search._run(first_places(search.plan))
    far_off = search._closer(replace(found, place=Place(0.8, 1.3)))
    assert (far_off.place.w, far_off.place.cfg_scale) == pytest.approx((0.8, 3.5), abs=0.15)
    assert far_off.images_spent == 200 * len(far_off.points)


def test_a_closer_look_that_the_budget_does_not_pay_is_said():
    at, exact = bent(Place(0.8, 2.2)), exact_noise(200)
    rich, poor = (plan(cfg_scale=(1.0, 4.0), most_images=200, budget_images=n) for n in (20_000, 2_000))
    far = searched(rich, at, exact)._run(first_places(rich))
    found = searched(poor, at, exact).run()
    assert (far.reason, found.reason) == ("images", "budget")
    assert (found.place, found.images_spent) == (far.place, far.images_spent)


@pytest.mark.parametrize(
    ("best_w", "said"),
    [(5.0, ["w = 3: w is now searched in -1 .. 5", "w = 5: w is now searched in -1 .. 8"]),
     (-2.5, ["w = -1: w is now searched in -3 .. 3"]), (1.3, [])],
)  # fmt: skip
def test_an_optimum_beyond_the_edge_extends_the_range_on_that_side_and_says_so(best_w, said):
    search, told = searched(plan(), model(best_w), unit_noise(20_000)), []
    search.tell = told.append
    found = search.run()
    assert found.place.w == pytest.approx(best_w, abs=0.3)
    assert found.reason == "gain"
    assert told == [f"the lowest distance lies at the edge, {line}" for line in said]


def test_a_range_that_the_budget_does_not_reach_is_not_said_to_be_searched():
    search, told = searched(plan(budget_images=700), model(5.0), unit_noise(20_000)), []
    search.tell = told.append
    found = search.run()
    assert (found.reason, found.is_at_edge) == ("budget", True)
    assert told == []
    choice = Choice(
        Point(w=found.place.w, snapshot="1"), None, "fd200[x]", [], found=found, plan=plan(budget_images=700)
    )
    assert why_it_ended(choice).endswith("lies at the edge, w = 3: a larger budget (select.budget_images) looks beyond")
    rows = {
        name: Score(Point(w=w, snapshot="1"), {"fd": 1 - w / 9}, {}, key=name) for name, w in (("base", 0), ("neon", 3))
    }
    assert verdict(choice, rows, "fd", Difference(1 / 3, 0.01)).kind == "edge"


def test_an_optimum_inside_that_the_budget_leaves_open_is_not_said_to_lie_at_the_edge():
    found = searched(plan(budget_images=700), model(1.3), unit_noise(20_000)).run()
    assert (found.reason, found.is_at_edge) == ("budget", False)


def test_an_optimum_that_runs_away_is_said_to_lie_at_the_edge():
    found = searched(plan(), model(100.0), unit_noise(20_000)).run()
    assert found.reason == "edge"
    assert found.place.w == 12.5  # widths 4, 6, 9: 3 + 2 + 3 + 4.5


def test_a_flat_curve_is_said_to_be_flat_and_the_base_stays():
    found = searched(plan(), model(0.5, curve=0.0), unit_noise(20_000)).run()
    assert found.reason == "flat"
    assert found.place.w == 0
    assert found.images_spent == 600


def test_a_curve_is_not_flat_because_its_highest_place_is_uncertain():
    """Two places are ten standard errors apart; a third, far outside, is higher still and known to a half."""
    values, errors = torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64), torch.tensor([0.0, 0.1, 4.0])
    draws = values + torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * errors
    places = [Place(0.0), Place(1.0), Place(3.0)]
    assert _is_flat(Surface(places, values, draws, torch.zeros(3)), noise=20.0) == "no"
    assert _is_flat(Surface(places[::2], values[::2], draws[:, ::2], torch.zeros(2)), noise=20.0) == "certainly"


@pytest.mark.parametrize(("best_w", "broken"), [(0.9, {"above": 1.5}), (-0.4, {"below": -0.8}), (1.4, {"above": 1.5})])
def test_images_that_are_not_finite_bound_the_range_and_stop_nothing(best_w, broken):
    found = searched(plan(), model(best_w), unit_noise(20_000), **broken).run()
    assert found.failed
    assert found.place.w == pytest.approx(best_w, abs=0.25)
    assert all(place.w > 1.5 or place.w < -0.8 for place in found.failed)


def test_a_base_that_gives_no_finite_image_is_an_error():
    with pytest.raises(ValueError, match="not even the base"):
        searched(plan(), model(0.5), unit_noise(2_000), above=-5.0).run()


def test_the_budget_is_hard_and_named():
    tight = searched(plan(budget_images=700), model(1.3), unit_noise(20_000)).run()
    assert tight.reason == "budget"
    assert tight.images_spent <= 700
    strict = plan(report_images=10_000_000, budget_images=5_000)  # a report that could show everything
    costly = searched(strict, model(1.3), unit_noise(20_000)).run()
    assert costly.reason == "budget"
    assert 1_600 < costly.images_spent <= 5_000
    assert costly.num_images > 200


def test_a_minimum_where_few_images_have_shown_none_is_not_chosen():
    """A parabola through three points near the best place, -0.25, is exact there, and lower still at 2.2: where the
    curve is high in truth, as 200 images at w = 2 had shown before the budget ended."""

    def at(place: Place) -> tuple[Tensor, float]:
        falling = 1 - place.w / 2.2
        offset = 0.5 * (place.w + 0.25) * falling if place.w < 0.5 else 0.9
        return torch.tensor([offset, 0.2 * falling, 0.0], dtype=torch.float64), 1.0

    search = searched(plan(), at, unit_noise(20_000))
    for w, count in ((-0.4, 2_000), (-0.2, 2_000), (0.0, 2_000), (2.0, 200)):
        search._measure(Place(w), count)
    fit, fine = search._fitted(-1.0, 3.0, 2_000)
    assert fine.places[fine.best].w == pytest.approx(2.2, abs=0.3)
    assert search._found(fit, fine, "budget", 2_000).place.w in (-0.4, -0.2)
    del search._features[Place(2.0)]  # nothing known there
    assert search._found(fit, fine, "budget", 2_000).place.w == pytest.approx(2.2, abs=0.3)


def test_the_expected_gain_and_its_error_are_those_of_the_draws_own_minima():
    """Four draws whose minima lie at the best place, at the second (twice) and at the third."""
    draws = torch.tensor([[0.0, 1, 2], [0, -1, 2], [0, 1, -3], [0, -1, 2]], dtype=torch.float64)
    places, values = [Place(0.0), Place(1.0), Place(2.0)], torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64)
    found = Surface(places, values, draws, torch.zeros(3))
    assert found.expected_gain == pytest.approx((0 + 1 + 3 + 1) / 4)
    assert found.gain_error == pytest.approx((0 + 2 * math.sqrt(4 / 3) + 2.5) / 4)


def test_a_better_place_is_expected_anywhere_in_the_range():
    """With few images the minimum may lie far from where the fit has it."""
    found = searched(plan(budget_images=600), model(1.3), unit_noise(200)).run()
    ws = [place.w for place in found.surface.places]
    assert (min(ws), max(ws)) == (-1.0, 3.0)
    near = [abs(w - found.place.w) for w in ws]
    assert sum(distance < 0.2 for distance in near) > 10


def test_a_plane_is_fitted_to_all_its_points():
    """Six of few images, far apart, and nine of many close together; a model that makes other images at every place
    from the same noise. The nine alone say nothing of the surface beyond them."""
    at = model(0.8, best_cfg=2.2)

    def evaluate(place: Place, images: range) -> Tensor:
        mean, scale = at(place)
        noise = unit_noise(800, seed=round(1_000 * (place.w + 2) + 10_000 * place.cfg_scale))
        return mean + scale * noise[images.start : images.stop]

    search = Search(plan(cfg_scale=(1.0, 4.0)), REFERENCE, evaluate)
    for place in first_places(search.plan):
        search._measure(place, 400)
    for w, cfg_scale in itertools.product((0.7, 0.8, 0.9), (2.1, 2.2, 2.3)):
        search._measure(Place(w, cfg_scale), 800)
    shares = [1.0 if 0.7 <= place.w <= 0.9 else 0.5 for place in search._points(800)]
    assert (search._trust(800) / search._nearness(800)).tolist() == pytest.approx(shares)
    whole, _ = search._fitted(-1.0, 3.0, 800)
    truth = torch.tensor([distance(*at(place)) for place in whole.places])
    assert float((whole.values - truth).abs().max() / truth.max()) < 0.3


@pytest.mark.parametrize(("cfg_scale", "errors"), [(None, 1.25), ((0.0, 2.0), 0.5)])
def test_a_plane_is_searched_more_surely_than_a_line(cfg_scale, errors):
    """The gain at which a search ends, in standard errors of the report's images (five times as many as here)."""
    search = searched(plan(cfg_scale=cfg_scale, report_images=2_000), model(0.8, 1.2), unit_noise(400))
    for place in [*first_places(search.plan), Place(0.8, 1.2)]:
        search._measure(place, 400)
    _, fine = search._fitted(-1.0, 3.0, 400)
    assert fine.gain_error > 0
    assert search._report_noise(fine, 400) == pytest.approx(errors * fine.gain_error / math.sqrt(5))


def test_a_choice_rests_on_enough_images_for_its_features():
    """One that 200 images decide within the noise goes on to the images without which the bias would decide."""
    short = partial(plan, report_images=500)
    assert searched(short(), model(1.3), unit_noise(20_000)).run().num_images == 200
    found = searched(short(decisive_images=500), model(1.3), unit_noise(20_000)).run()
    assert (found.reason, found.num_images) == ("gain", 500)
    assert searched(short(decisive_images=500, most_images=300), model(1.3), unit_noise(300)).run().num_images == 300


def test_a_selection_block_that_is_used_up_is_said():
    found = searched(plan(report_images=10_000_000, most_images=300), model(1.3), unit_noise(20_000)).run()
    assert (found.reason, found.num_images) == ("images", 300)


def test_the_base_has_a_guidance_of_its_own():
    """Here the valley is oblique: the base is best at 2.7, the choice (w = 0.8) at 2.2."""

    def at(place: Place) -> tuple[Tensor, float]:
        shift = place.cfg_scale - 2.7 + 0.625 * place.w
        return torch.tensor([0.4, place.w - 0.8, shift], dtype=torch.float64), 1.1

    found = searched(plan(cfg_scale=(1.0, 4.0)), at, unit_noise(20_000)).run()
    assert found.base.w == 0
    assert found.base.cfg_scale == pytest.approx(2.7, abs=0.2)
    assert (found.place.w, found.place.cfg_scale) == pytest.approx((0.8, 2.2), abs=0.2)


def test_a_search_repeats_itself_on_what_it_knows():
    """Killed after any evaluation and started again with the evaluations that were finished: the same choice."""
    known: dict[tuple[Place, range], Tensor] = {}
    first = searched(plan(report_images=200_000), model(1.3), unit_noise(20_000))
    evaluate, asked = first.evaluate, []

    def remembered(place: Place, images: range) -> Tensor | None:
        asked.append((place, images))
        if (place, images) not in known:
            if len(known) == stop_at:
                raise KeyboardInterrupt
            known[place, images] = evaluate(place, images)
        return known[place, images]

    whole = first.run()
    for stop_at in (2, 4, 1_000):
        asked.clear()
        again = Search(first.plan, REFERENCE, remembered)
        if stop_at < 1_000:
            with pytest.raises(KeyboardInterrupt):
                again.run()
    assert again.run().place == whole.place
    assert len(asked) == len(known)  # nothing was asked twice in the last run
