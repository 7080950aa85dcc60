"""The page of a run: verdict, curve, slider over w, pictures, table, cost and protocol in one HTML file that needs
nothing else: no server, no network."""

from __future__ import annotations

import base64
import datetime
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from neon.report.figures import DARK, LIGHT, as_png, caption, curve_figure, distance_name, shrunk, summary_figure, tile
from neon.report.page_style import PAGE
from neon.report.result import FORMULA, Result, why_it_ended
from neon.store import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SLIDE_PIXELS = 150_000
"""Of one picture of the slider: 36 images of 64 x 64, two of 256 x 256."""


def write_page(result: Result, path: Path) -> None:
    """Write the page of a result, and its summary as a .png beside it."""
    name = path.resolve().parent.name
    files.write_text(path, page(result, name, datetime.datetime.now(datetime.UTC).date()))
    with files.replacing(path.with_suffix(".png")) as stream:
        stream.write(as_png(summary_figure(result)))


def page(result: Result, name: str, date: datetime.date) -> str:
    family = str(_mapping(result.about.get("config")).get("family_name", ""))
    comparable = result.not_comparable
    body = f"""<header><h1>Neon: {html.escape(name)}</h1>
<p class="small">{html.escape(family)}, {date.isoformat()}</p></header>
<p class="verdict {result.verdict.kind}">{html.escape(result.verdict.text)}</p>
<p>These values are {"comparable" if comparable is None else "not comparable"} with published FIDs{
        "" if comparable is None else ": " + html.escape(comparable)
    }.</p>
<p>The model sampled a synthetic set, was fine-tuned on it briefly, and was then moved the other way:
<code>{html.escape(FORMULA)}</code>. w = 0 is the base, w = -1 the self-trained model.</p>
<h2>The search</h2>{_curve(result)}<p class="small">{html.escape(why_it_ended(result.choice))}.</p>{
        "" if result.diagnosis is None else f'<p class="small">{html.escape(result.diagnosis)}</p>'
    }
{_neighbours(result)}
{_slider(result)}
<h2>Held-out noise</h2><div class="wide">{_table(result)}</div>
<p class="small">{html.escape(_selection_against_report(result))}</p>
<h2>The same noise through each model</h2><div class="grids">{_pictures(result)}</div>
<h2>What it cost</h2><div class="wide">{_costs(result)}</div>
<h2>Use it</h2>{_use(result)}
<h2>Protocol</h2><details><summary>Everything that these numbers depend on</summary>
<pre>{html.escape(json.dumps(dict(result.about), indent=1))}</pre></details>"""
    return PAGE.replace("TITLE", html.escape(f"Neon: {name}")).replace("BODY", body)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _curve(result: Result) -> str:
    """The figure twice: for a light and for a dark page."""
    light, dark = (_data_uri(curve_figure(result, ink)) for ink in (LIGHT, DARK))
    point = result.choice.point
    scale = "" if point.cfg_scale is None else f" and guidance {point.cfg_scale:g}"
    alt = (
        f"{distance_name(result.choice)} on the selection seeds against w{' and guidance' if scale else ''}: "
        f"{len(result.choice.scores)} points, lowest at w = {point.w:g}{scale}"
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img class="plot" src="{light}" alt="{html.escape(alt)}"></picture>'
    )


def _slider(result: Result) -> str:
    """Pictures of the same seeds at every evaluated w, one of them shown."""
    slides = [(_place(w, cfg), w, shrunk(images, SLIDE_PIXELS)) for w, cfg, images in result.slides]
    seeds = "the selection seeds"
    if len(slides) < 2:
        rows = [(row, result.rows[row].point.w) for row in ("self-trained", "base", "neon") if row in result.pictures]
        slides = [
            (caption(row, result), w, shrunk(result.pictures[row], SLIDE_PIXELS))
            for row, w in sorted(rows, key=lambda item: item[1])
        ]
        seeds = "held-out seeds"
    if len(slides) < 2:
        return ""
    start = min(range(len(slides)), key=lambda i: abs(slides[i][1]))
    frames = [{"label": label, "src": _image_uri(tile(images))} for label, _, images in slides]
    return f"""<h2>The same noise at every w</h2><figure class="slides">
<label for="w">w</label><input id="w" type="range" min="0" max="{len(frames) - 1}" step="1" value="{start}"
 aria-describedby="label"><output id="label" for="w">{html.escape(frames[start]["label"])}</output>
<img id="slide" class="pixels" src="{frames[start]["src"]}" alt="Samples at {html.escape(frames[start]["label"])}">
<figcaption>The same {len(slides[0][2])} of {seeds}, at the points that were evaluated.</figcaption></figure>
<script type="application/json" id="frames">{json.dumps(frames)}</script>"""


def _place(w: float, cfg_scale: float | None) -> str:
    return f"w = {w:g}" + ("" if cfg_scale is None else f", cfg {cfg_scale:g}")


def _table(result: Result) -> str:
    names = list(next((s.metrics for s in result.rows.values() if s.metrics), {}))
    base = result.rows["base"].metrics
    extra = [m for m in ("precision", "recall") if any(m in found for found in result.neighbours.values())]
    body = []
    for name, score in result.rows.items():
        cells = [name, _place(score.point.w, score.point.cfg_scale)]
        for metric in names:
            if score.failed is not None:
                cells.append("no numbers")
                continue
            error = f" +- {result.errors[name]:.2g}" if metric == result.metric and name in result.errors else ""
            change = "" if name == "base" or not base.get(metric) else score.metrics[metric] / base[metric] - 1
            text = f"{score.metrics[metric]:.4g}{error}"
            cells.append(text + ("" if change == "" else f" <small>({100 * float(change):+.0f} %)</small>"))
        cells += [f"{result.neighbours.get(name, {}).get(m, float('nan')):.3f}" for m in extra]
        body.append(cells)
    return _rows(["", "", *map(html.escape, names), *extra], body)


def _rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _neighbours(result: Result) -> str:
    """Precision and recall along the curve."""
    curve = {label: found for label, found in result.neighbours.items() if label not in result.rows}
    if not curve:
        return ""
    body = [[html.escape(label), f"{m['precision']:.3f}", f"{m['recall']:.3f}"] for label, m in curve.items()]
    note = "5 nearest neighbours against the images of [data]; few images give a low recall"
    table = _rows(["point", "precision", "recall"], body)
    return (
        f'<details><summary>Precision and recall along the curve</summary>{table}<p class="small">{note}.</p></details>'
    )


def _selection_against_report(result: Result) -> str:
    """The choice's value where it was chosen beside that on held-out noise: how optimistic the choice was."""
    choice, value = result.choice, result.neon.metrics.get(result.metric)
    if choice.found is None or value is None:
        return f"Chosen by {choice.metric} on other seeds than these."
    found = choice.found.surface
    return (
        f"On the selection seeds the search expected {float(found.values[found.best]):.4g} +- {found.noise:.2g} at the "
        f"chosen point, with the bias of few images taken off (N = {choice.found.num_images}); {result.metric} on "
        f"held-out noise is {value:.4g}, its own bias included."
    )


def _pictures(result: Result) -> str:
    figures = []
    for name, images in result.pictures.items():
        alt = f"{len(images)} samples: {caption(name, result)}"
        picture = f'<img class="pixels" src="{_image_uri(tile(images))}" alt="{html.escape(alt)}">'
        figures.append(f"<figure>{picture}<figcaption>{html.escape(caption(name, result))}</figcaption></figure>")
    return "".join(figures)


def _costs(result: Result) -> str:
    body = []
    for cost in result.costs:
        calls = "not counted" if cost.network_calls is None else f"{cost.network_calls:,}"
        seconds = "not known" if cost.seconds is None else f"{cost.seconds:,.0f}"
        part = cost.share_of_training
        share = "not known" if part is None else f"{100 * part:{'.2g' if part < 0.1 else ',.0f'}} %"
        body.append([cost.stage, f"{cost.images:,}", calls, seconds, share])
    note = "A training image counts as three network calls. The share needs the base's own [train] in the config."
    return (
        _rows(["", "images", "network calls", "seconds", "of the base's training"], body)
        + f'<p class="small">{note}</p>'
    )


def _use(result: Result) -> str:
    path = html.escape(str(result.about.get("merged", "neon.safetensors")))
    is_base = " It holds the base's own weights, since no w helped." if result.neon.point.w == 0 else ""
    scale = result.neon.point.cfg_scale  # where the config leaves it to the search, `neon eval` cannot know it
    guidance = "" if scale is None else f" --set report.cfg_scale={scale:g}"
    is_by_functions = _mapping(result.about.get("config")).get("family_name") == "neon.improve"  # there is no config
    again = "" if is_by_functions else f"neon eval CONFIG --checkpoint {path}{guidance}\n"
    return f"""<p>The merged model is <code>{path}</code>.{is_base}</p>
<pre>neon info {path}
{again}
from safetensors.torch import load_file
model.load_state_dict(load_file("{path}"))</pre>"""


def _data_uri(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(as_png(figure, transparent=True)).decode()


def _image_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
