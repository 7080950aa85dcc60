"""The page of a run: what its figures show, that it needs nothing else, and that its slider moves in a real browser."""

from __future__ import annotations

import base64
import datetime
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from PIL import Image

from neon.pipeline.evaluate_base import evaluate_base
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.report import page
from neon.report.figures import LIGHT, _blank, curve_figure, draw_curve, summary_figure
from neon.report.result import Result
from neon.runtime.distributed import World

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)
SEARCH = ("select.strategy=search", "select.num_images=120", "select.snapshots=last", "synth.cfg_scale=0.5")


def finished(config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[Result, str]:
    """The typed result that a run gave to its page, and the page."""
    seen: list[Result] = []
    write = page.write_page
    monkeypatch.setattr(page, "write_page", lambda result, path: (seen.append(result), write(result, path)))
    Run(load(config, overrides), folder, World()).all()
    return seen[0], (folder / "report.html").read_text()


def frames_of(text: str) -> list[dict[str, str]]:
    (found,) = re.findall(r'<script type="application/json" id="frames">(.*?)</script>', text, re.S)
    return json.loads(found)


def test_the_page_of_a_search(line_config, tmp_path, monkeypatch):
    result, text = finished(line_config, tmp_path / "my-run", monkeypatch, *SEARCH)
    assert "<title>Neon: my-run</title>" in text
    assert html.escape(result.verdict.text) in text
    assert not re.search(r'(src|href|srcset)="(?!data:)', text)  # nothing is fetched
    images = re.findall(r"<img [^>]*>", text)
    assert len(images) >= 6
    assert all(re.search(r'alt="[^"]{5,}"', image) for image in images)
    frames = frames_of(text)
    own = {(p.w, p.cfg_scale) for p in (s.point for s in result.choice.scores)}
    assert len(frames) == len(own)
    assert len({frame["src"] for frame in frames}) == len(frames)
    for name, score in result.rows.items():
        assert f"<td>{name}</td>" in text
        assert f"{score.metrics[result.metric]:.4g} +- {result.errors[name]:.2g}" in text
    costs = {cost.stage: cost for cost in result.costs}
    assert costs["synthetic set"].network_calls is None  # the line's sampler calls no module
    assert costs["search"].images == result.choice.found.images_spent
    if CHROMIUM is not None:
        moved_in_a_browser(tmp_path / "my-run/report.html", frames)


def moved_in_a_browser(path: Path, frames: list[dict[str, str]]) -> None:
    """Open the file in Chromium, move the slider to its end by script, and read the picture and the label back."""
    move = """<script>
const end = document.getElementById("w");
end.value = end.max;
end.dispatchEvent(new Event("input"));
</script></body>"""
    moved = path.with_name("moved.html")
    moved.write_text(path.read_text().replace("</body>", move))
    seen = []
    for file in (path, moved):
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{file}"]
        dom = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120).stdout
        picture = re.search(r'<img id="slide"[^>]*src="([^"]*)"', dom)
        label = re.search(r'<output id="label"[^>]*>([^<]*)<', dom)
        assert picture is not None
        assert label is not None
        seen.append((picture.group(1), html.unescape(label.group(1))))
    assert seen[0] != seen[1]
    assert seen[1] == (frames[-1]["src"], frames[-1]["label"])


def test_every_guidance_of_a_grid_is_drawn_and_the_axis_fits_the_data(line_config, tmp_path, monkeypatch):
    result, text = finished(line_config, tmp_path / "run", monkeypatch)
    lifted = [
        replace(s, metrics={name: 382 + 6 * value for name, value in s.metrics.items()}) for s in result.choice.scores
    ]
    axes = _blank(5, 4, dpi=50).add_subplot()
    draw_curve(axes, replace(result, choice=replace(result.choice, scores=lifted)), LIGHT)
    lines = [line for line in axes.get_lines() if line.get_marker() == "o" and len(line.get_xdata()) > 1]
    assert len(lines) == 4  # two snapshots, two guidances
    low, high = axes.get_ylim()
    errors = result.choice.errors
    assert set(errors) == {s.point for s in result.choice.scores}
    assert len([bar for bar in axes.containers if isinstance(bar, ErrorbarContainer)]) == len(errors)
    ends = [s.metrics[result.choice.metric] + sign * errors[s.point] for s in lifted for sign in (-1, 1)]
    assert low < min(ends)
    assert max(ends) < high
    assert high - low < 1.5 * (max(ends) - min(ends))
    rows = [name for name in result.rows if name != "random direction"]
    assert [frame["label"][:4] for frame in frames_of(text)] == ["self", "base", "Neon"][: len(rows)]


def test_the_page_says_how_its_headline_is_evaluated_again(line_config, tmp_path, monkeypatch):
    """`neon eval` cannot know the guidance that a search chose: the page's own command was an error."""
    result, text = finished(line_config, tmp_path / "run", monkeypatch, *SEARCH)
    (setting,) = re.findall(r"neon eval CONFIG --checkpoint \S+ --set (\S+)", text)
    config = load(line_config, [f"base.checkpoint={tmp_path}/run/neon.safetensors", setting])
    found = evaluate_base(Run(config, tmp_path / "again", World()), 1)
    assert found["value"] == result.neon.metrics[result.metric]


def test_a_page_of_neon_improve_names_no_config(line_config, tmp_path, monkeypatch):
    result, text = finished(line_config, tmp_path / "run", monkeypatch, *SEARCH)
    by_functions = replace(result, about={**result.about, "config": {"family_name": "neon.improve"}})
    own = page.page(by_functions, "run", datetime.date(2026, 1, 1))
    assert "neon eval CONFIG" in text
    assert "neon eval" not in own
    assert re.search(r"<pre>neon info \S+\n\nfrom safetensors", own)


def test_a_cost_above_the_base_s_training_is_a_plain_number(line_config, tmp_path, monkeypatch):
    result, _ = finished(line_config, tmp_path / "run", monkeypatch, *SEARCH)
    costs = [replace(result.costs[0], share_of_training=part) for part in (0.00234, 0.094, 1.55, 38.2)]
    text = page.page(replace(result, costs=costs), "run", datetime.date(2026, 1, 1))
    assert re.findall(r"<td>([^<]* %)</td>", text) == ["0.23 %", "9.4 %", "155 %", "3,820 %"]


@pytest.mark.parametrize("overrides", [SEARCH, ()], ids=["map", "grid"])
def test_every_word_of_the_figures_is_on_the_picture_and_no_title_on_another(
    line_config, tmp_path, monkeypatch, overrides
):
    """Numbers beside points on the edge of the map were cut off or white on white; long metrics ran into each other."""
    result, _ = finished(line_config, tmp_path / "run", monkeypatch, *overrides)
    for figure in (curve_figure(result), summary_figure(result)):
        figure.draw_without_rendering()
        for axes in figure.axes:
            legend = axes.get_legend()
            words = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *(legend.texts if legend else ())]
            for box in [text.get_window_extent() for text in words if text.get_text()]:
                assert figure.bbox.padded(1).contains(*box.min)
                assert figure.bbox.padded(1).contains(*box.max)
        titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
        assert not any(a.overlaps(b) for a, b in combinations(titles, 2))


@pytest.mark.parametrize("cfg_scale", ["[1.0, 1.2]", "[1.0]"], ids=["map", "curve"])
def test_points_near_to_each_other_can_be_read(line_config, tmp_path, monkeypatch, cfg_scale):
    """Their labels lay on one another, and the axis named 120 images beside points of 240."""
    result, _ = finished(line_config, tmp_path / "run", monkeypatch, *SEARCH, f"select.cfg_scale={cfg_scale}")
    first = result.choice.measured[0]
    near = replace(first, point=replace(first.point, w=first.point.w + 0.01), num_images=60, value=first.value + 1e-3)
    figure = curve_figure(replace(result, choice=replace(result.choice, measured=[*result.choice.measured, near])))
    axes = figure.axes[0]
    shown = [text for text in axes.texts if text.get_visible()]
    figure.draw_without_rendering()
    assert not any(a.get_window_extent().overlaps(b.get_window_extent()) for a, b in combinations(shown, 2))
    words = " ".join(text.get_text() for text in (*shown, *axes.get_legend().texts, *axes.texts))
    assert "120" in words
    assert "60" in words
    labels = [label for a in figure.axes for label in (a.get_xlabel(), a.get_ylabel())]
    assert any(label.startswith("fd[") for label in labels)
    assert not any("fd120" in label for label in labels)
    if cfg_scale == "[1.0]":
        assert "60 images, not in the fit" in words


def test_pictures_are_the_pixels(line_config, tmp_path, monkeypatch):
    """A frame of the slider decodes to the images that the ledger keeps, one pixel of white between them."""
    result, text = finished(line_config, tmp_path / "run", monkeypatch, *SEARCH)
    w, cfg_scale, images = result.slides[0]
    frame = frames_of(text)[0]
    assert frame["label"] == f"w = {w:g}, cfg {cfg_scale:g}"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(frame["src"].split(",")[1]))))
    assert (pixels[:4, :4] == images[0, 0].numpy()).all()
    assert (pixels[:4, 5:9] == images[1, 0].numpy()).all()
