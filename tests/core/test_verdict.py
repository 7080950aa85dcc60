"""The sentence that a run ends with, for every way in which it can end."""

from __future__ import annotations

import pytest

from neon.report.result import Difference, selection, verdict
from neon.search.choose import Choice
from neon.search.points import Point, Score

METRIC = "fid50k"


def score(w: float, value: float, direction: str = "synth", failed: str | None = None) -> Score:
    metrics = {} if failed else {METRIC: value}
    return Score(Point(w=w, snapshot="1", direction=direction), metrics, {}, key=f"{direction}{w}", failed=failed)


def said(*, w: float = 1.0, base: float = 2.39, neon: float = 1.12, random: float = 2.41, error: float | None = 0.02):
    curve = [score(v, base) for v in (-1.0, 0.0, 0.5, 1.0, 1.5)]
    rows = {
        "base": score(0.0, base),
        "self-trained": score(-1.0, 5.0),
        "random direction": score(w, random, "random"),
        "neon": score(w, neon),
    }
    choice = Choice(point=Point(w=w, snapshot="1"), base_cfg_scale=None, metric=METRIC, scores=curve)
    return verdict(choice, rows, METRIC, Difference(base - neon, error))


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ({}, "helps", "Neon helps: fid50k 2.39 -> 1.12 at w = 1 (difference 1.27 +- 0.02)"),
        ({"w": 0.0, "neon": 2.39}, "base", "no w helped: w = 0 is best; the merged file is the base"),
        ({"w": 1.5}, "edge", "at the edge of what was tried: widen w (select.w) for more"),
        ({"neon": 2.36}, "noise", "within noise: fid50k 2.39 -> 2.36"),
        ({"neon": 2.6}, "worse", "worse on held-out noise: fid50k 2.39 -> 2.6"),
    ],
)
def test_every_end_has_its_sentence(case, kind, text):
    found = said(**case)
    assert found.kind == kind
    assert text in found.text


def test_a_random_direction_that_gains_as_well_is_told():
    """2.39 -> 1.755 is half of 2.39 -> 1.12; a tenth of it, or less than the noise, is not worth a word."""
    assert "2.39 -> 1.755): 50 % of the gain comes with any such step" in said(random=1.755).text
    assert "random" not in said(random=2.39 - 0.127).text
    assert "random" not in said(random=1.755, error=0.5).text
    assert "random" not in said(random=3.0).text


def test_images_that_are_no_numbers_have_no_verdict():
    rows = {"base": score(0.0, 2.0), "neon": score(1.0, 0.0, failed="NaN")}
    choice = Choice(point=Point(w=1.0, snapshot="1"), base_cfg_scale=None, metric=METRIC, scores=[])
    found = verdict(choice, rows, METRIC, Difference(float("nan"), None))
    assert (found.kind, found.text) == ("failed", "no verdict: the images of neon are no numbers")


def test_the_parabola_of_an_earlier_snapshot_goes_through_the_base_too():
    """w = 0 is entered under the last snapshot; (w - 0.4)^2 near the minimum, and something else at w = -1."""
    points = [("2", 0.0, 1.16), ("1", -1.0, 50.0), ("1", 0.5, 1.01), ("1", 1.0, 1.36), ("2", 0.5, 3.0)]
    scores = [Score(Point(w=w, snapshot=shot), {METRIC: value}, {}, key=f"{shot}{w}") for shot, w, value in points]
    choice = Choice(point=Point(w=0.5, snapshot="1"), base_cfg_scale=None, metric=METRIC, scores=scores)
    assert selection(choice)["parabola_w"] == pytest.approx(0.4)
