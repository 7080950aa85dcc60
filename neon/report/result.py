"""What a run found, typed, with its verdict and its cost; `as_json` is result.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from neon.config_table import to_plain, to_table
from neon.evaluation.evaluate import Yardstick
from neon.search.choose import Choice
from neon.search.found import Found
from neon.search.plan import Plan
from neon.search.points import Point, Score, parabola_minimum
from neon.search.surface import Place, period_of, standard_error, surface

Kind = Literal["helps", "base", "edge", "flat", "noise", "worse", "failed"]
MUCH = 0.25
"""Share of the gain above which a random direction's own gain is told."""
LEAST_FOR_ERRORS = 4
"""Images of a row that has an error bar."""
FORMULA = "theta_neon = theta_base - w (theta_syn - theta_base)"


@dataclass(frozen=True)
class Difference:
    """base - Neon on the report's noise, positive: Neon is better. error: standard error over images, None where the
    features of an earlier version's point were not kept."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Verdict:
    """One sentence about what the run showed, and its reason."""

    kind: Kind
    text: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One stage: what it took in this folder. None: not known."""

    stage: str
    images: int
    network_calls: int | None
    seconds: float | None
    share_of_training: float | None
    """Images over those that the base was trained on."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that the page shows and result.json holds."""

    metric: str
    rows: Mapping[str, Score]
    choice: Choice
    difference: Difference
    verdict: Verdict
    not_comparable: str | None
    """Why the value may not stand beside published FIDs; None: it may."""
    errors: Mapping[str, float]
    """Standard error of the rows' values."""
    neighbours: Mapping[str, Mapping[str, float]]
    """Row, or "w = ..." of the curve -> {precision, recall}; empty without [data]."""
    costs: Sequence[Cost]
    pictures: Mapping[str, Tensor] = field(repr=False)
    """Row -> uint8 images (n, C, H, W) of the same held-out seeds."""
    slides: Sequence[tuple[float, float | None, Tensor]] = field(repr=False)
    """(w, cfg_scale, uint8 images) of the same selection seeds, in the order of w."""
    about: Mapping[str, object]
    """Config, hashes, versions, device: what the numbers depend on."""
    diagnosis: str | None = None
    """What `neon diagnose` had said beside what the search found; None: it was not asked."""

    @property
    def neon(self) -> Score:
        return self.rows["neon"]

    def as_json(self) -> dict[str, object]:
        row = self.neon
        return {
            "metric": self.metric,
            "value": row.metrics.get(self.metric),
            "base_value": self.rows["base"].metrics.get(self.metric),
            "verdict": self.verdict.text,
            "difference": to_plain(self.difference),
            "comparable": self.not_comparable is None,
            "reason": self.not_comparable,
            "w": row.point.w,
            "cfg_scale": row.point.cfg_scale,
            "snapshot_images": int(row.point.snapshot),
            "formula": FORMULA,
            "rows": {name: self._row(name, score) for name, score in self.rows.items()},
            "select": selection(self.choice),
            "diagnosis": self.diagnosis,
            "neighbours": to_plain(self.neighbours),
            "costs": to_plain(list(self.costs)),
            **self.about,
        }

    def _row(self, name: str, score: Score) -> dict[str, object]:
        point = score.point
        found: dict[str, object] = {
            "w": point.w,
            "cfg_scale": point.cfg_scale,
            "metrics": score.metrics,
            "seconds": score.seconds,
        }
        if score.made_with != self.neon.made_with:
            found["made_with"] = score.made_with
        return found | ({"error": self.errors[name]} if name in self.errors else {}) | _failure(score)


IN_FILE = frozenset({"formula", "select", "neighbours", "config", "hashes", "references", "step", "versions"})
"""Keys that only result.json holds."""


def summary(result: Mapping[str, object], folder: Path) -> dict[str, object]:
    """What `neon run` prints of its result (`as_json`): verdict, rows, costs, and the files that hold the rest."""
    rows = result["rows"]
    assert isinstance(rows, Mapping)
    short = {name: {k: v for k, v in row.items() if k not in ("seconds", "made_with")} for name, row in rows.items()}
    said = {key: value for key, value in result.items() if key not in IN_FILE}
    return {**said, "rows": short, "result": str(folder / "result.json"), "page": str(folder / "report.html")}


def _failure(score: Score) -> dict[str, object]:
    return {} if score.failed is None else {"failed": score.failed}


def selection(choice: Choice) -> dict[str, object]:
    """How the point was chosen, as JSON."""
    points = [{**to_table(s.point), "metrics": s.metrics, "seconds": s.seconds, **_failure(s)} for s in choice.scores]
    found: dict[str, object] = {"metric": choice.metric, "points": points}
    if choice.found is None or choice.plan is None:
        return {"strategy": "grid", "parabola_w": parabola_minimum(_curve(choice), choice.metric), **found}
    search = choice.found
    return {
        "strategy": "search",
        **found,
        "components": choice.components,
        "chosen": to_table(choice.point),
        "ended_by": search.reason,
        "why": why_it_ended(choice),
        "images": search.images_spent,
        "budget_images": choice.plan.budget_images,
        "expected_gain": search.gain,
        "noise": search.noise,
        "measured": [
            {**to_table(m.point), "num_images": m.num_images, "value": _finite(m.value), "error": _finite(m.error)}
            for m in choice.measured
        ],
        "fitted": [
            {"w": p.w, "cfg_scale": p.cfg_scale if choice.plan.cfg_scale else None, "value": v, "error": e}
            for p, v, e in zip(
                search.whole.places, search.whole.values.tolist(), search.whole.draws.std(dim=0).tolist(), strict=True
            )
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _curve(choice: Choice) -> list[Score]:
    """The grid's points at the chosen snapshot and guidance."""
    point = choice.point
    return [s for s in choice.scores if is_on(s.point, point.snapshot, point.cfg_scale)]


def is_on(point: Point, snapshot: str, cfg_scale: float | None) -> bool:
    """Whether a point lies on the curve over w of this snapshot and guidance; w = 0 is the base, whatever the
    snapshot."""
    return point.direction == "synth" and point.cfg_scale == cfg_scale and (point.snapshot == snapshot or point.w == 0)


def why_it_ended(choice: Choice) -> str:
    """One sentence: what ended the search."""
    search, plan = choice.found, choice.plan
    if search is None or plan is None:
        return "a fixed grid: every point was evaluated"
    spent = f"{search.images_spent:,} images"
    at_edge = plan.is_plane and plan.cfg_scale is not None and search.place.cfg_scale in plan.cfg_scale
    edge = f"; guidance {search.place.cfg_scale:g} lies at the edge of select.cfg_scale: widen it" if at_edge else ""
    return _ended_by(search, plan, spent) + edge


def _ended_by(search: Found, plan: Plan, spent: str) -> str:
    edge = f"the lowest distance lies at the edge, w = {search.place.w:g}"
    left = f"a better place could gain about {search.gain:.3g}"
    return {
        "gain": f"{spent}; {left}, less than the report's images could show ({search.noise:.3g})",
        "budget": f"the next step would not fit into the budget of {plan.budget_images:,} images ({spent}); "
        + (f"{edge}: a larger budget (select.budget_images) looks beyond" if search.is_at_edge else left),
        "images": f"{spent}; every point that decides used the whole selection block of {plan.most_images:,}; "
        + (f"{edge}: widen w (select.w)" if search.is_at_edge else f"{left}: make select.num_images larger"),
        "flat": f"{spent}; the curve is flat: no two values of w can be told apart",
        "edge": f"{spent}; {edge}: widen w (select.w)",
    }[search.reason]


def compared(
    rows: Mapping[str, Mapping[str, Tensor]], yardstick: Yardstick, values: Mapping[str, float], num_classes: int
) -> tuple[Difference, dict[str, float]]:
    """base - Neon with its standard error, and the error of every row, from the features of the report's images.

    rows: row -> extractor -> features (N, D), without rows whose features were not kept. values: row -> distance.
    """
    name, reference = yardstick.extractor.name, yardstick.reference
    difference = values.get("base", math.nan) - values.get("neon", math.nan)
    kept = {row: features[name] for row, features in rows.items() if name in features}
    if reference is None or not kept or len(next(iter(kept.values()))) < LEAST_FOR_ERRORS:
        return Difference(difference, None), {}
    places = [Place(float(i)) for i in range(len(kept))]  # rows as places: the same images, so differences are sharp
    period = period_of(len(next(iter(kept.values()))), num_classes)
    errors: dict[str, float] = {}
    for row, features in kept.items():
        errors[row] = standard_error(features, reference, period)
    if not {"base", "neon"} <= set(kept):
        return Difference(difference, None), errors
    pair = [kept["base"], kept["neon"]]
    both = surface(places[:2], torch.stack(pair), reference, places[:2], num_classes=period)
    return Difference(difference, both.difference(0, 1)[1]), errors


def verdict(choice: Choice, rows: Mapping[str, Score], metric: str, difference: Difference) -> Verdict:
    """What the run showed, by the difference on held-out noise and by how the search ended."""
    point, ended = choice.point, None if choice.found is None else choice.found.reason
    failed = [name for name in ("base", "neon") if rows[name].failed is not None]
    if failed:
        return Verdict("failed", f"no verdict: the images of {' and '.join(failed)} are no numbers")
    base, neon = rows["base"].metrics[metric], rows["neon"].metrics[metric]
    error = difference.error
    spread = "" if error is None else f" (difference {difference.value:.3g} +- {error:.2g})"
    numbers = f"{metric} {base:.4g} -> {neon:.4g} at w = {point.w:g}{spread}"
    if point.w == 0:
        flat = "the curve over w is flat" if ended == "flat" else "w = 0 is best"
        return Verdict("flat" if ended == "flat" else "base", f"no w helped: {flat}; the merged file is the base")
    if error is not None and abs(difference.value) < 2 * error:
        return Verdict("noise", f"within noise: {numbers} is less than two standard errors")
    if difference.value < 0:
        return Verdict("worse", f"worse on held-out noise: {numbers}, although it was best on the selection seeds")
    numbers += _share_of_any_step(rows, metric, difference)
    if _at_edge(choice):
        more = (
            "a larger budget (select.budget_images) looks beyond"
            if ended == "budget"
            else "widen w (select.w) for more"
        )
        return Verdict("edge", f"{numbers}, and w lies at the edge of what was tried: {more}")
    return Verdict("helps", f"Neon helps: {numbers}")


def diagnosis_against_search(diagnosis: Mapping[str, object], result: Result) -> str:
    """What `neon diagnose` said (its JSON) beside the chosen w, in two sentences."""
    sign, w = diagnosis["sign_of_w"], result.choice.point.w
    said = f"neon diagnose said: {diagnosis['sentence']}."
    if result.verdict.kind not in ("helps", "edge"):
        return f"{said} No w was shown to help here, so that there is nothing to compare it with."
    chosen = f"The choice is w = {w:g}"
    if sign == 0:
        return f"{said} {chosen}."
    if sign == math.copysign(1, w):
        return f"{said} {chosen}: the diagnosis was right about the sign."
    why = f"it speaks of the loss, the choice of {result.metric}"
    return f"{said} {chosen}: the diagnosis was wrong about the sign; {why}."


def _share_of_any_step(rows: Mapping[str, Score], metric: str, difference: Difference) -> str:
    """What must be said if a random direction of the same length gains as well: then not all is the direction's."""
    control = rows.get("random direction")
    if control is None or control.failed is not None or difference.value <= 0:
        return ""
    gain = rows["base"].metrics[metric] - control.metrics[metric]
    if gain < max(MUCH * difference.value, 2 * (difference.error or 0.0)):
        return ""
    return (
        f"; but a random direction of the same length gains too ({rows['base'].metrics[metric]:.4g} -> "
        f"{control.metrics[metric]:.4g}): {100 * gain / difference.value:.0f} % of the gain comes with any such step"
    )


def _at_edge(choice: Choice) -> bool:
    if choice.found is not None:
        return choice.found.is_at_edge
    tried = sorted(s.point.w for s in _curve(choice))
    return choice.point.w in (tried[0], tried[-1])
