"""The figures of a run: the curve or map over (w, cfg_scale), and the same noise through each model."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from neon.report.result import Result, is_on
from neon.search.choose import Choice, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

CAPTIONS = {"base": "base (w = 0)", "self-trained": "self-trained (w = -1)", "neon": "Neon"}


@dataclass(frozen=True)
class Ink:
    """Colours on one background."""

    text: str
    faint: str
    base: str
    neon: str
    random: str
    synth: str

    def of(self, row: str) -> str:
        return {"self-trained": self.synth, "random direction": self.random, "neon": self.neon}.get(row, self.base)


LIGHT = Ink("#1b1b1f", "#d5d5dc", "#6b7280", "#c2185b", "#b08900", "#1565c0")
DARK = Ink("#ececf1", "#44444f", "#a3abb8", "#ff6fa5", "#e5b93c", "#7fb2ff")


def curve_figure(result: Result, ink: Ink = LIGHT) -> Figure:
    """What the selection seeds showed: a curve over w with error bars, or a map over (w, cfg_scale)."""
    figure = _blank(7.5, 4.4, dpi=130)
    axes = figure.add_subplot()
    if result.choice.plan is not None and result.choice.plan.is_plane:
        draw_map(axes, result, ink)
    else:
        draw_curve(axes, result, ink)
    hide_what_overlaps(figure)
    return figure


def summary_figure(result: Result) -> Figure:
    """The curve beside the same noise through base, self-trained model and Neon: one picture that says what
    happened."""
    names = [name for name in ("self-trained", "base", "neon") if name in result.pictures]
    figure = _blank(15, 4.1, dpi=120)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.95))  # the titles' upper lines
    axes = np.atleast_1d(figure.subplots(1, 1 + len(names), width_ratios=[1.25, *(1 for _ in names)]))
    if result.choice.plan is not None and result.choice.plan.is_plane:
        draw_map(axes[0], result, LIGHT)
    else:
        draw_curve(axes[0], result, LIGHT)
    for axis, name in zip(axes[1:], names, strict=True):
        axis.imshow(tile(result.pictures[name]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        value = result.rows[name].metrics.get(result.metric, math.nan)
        axis.set_title(f"{caption(name, result)}\n{result.metric} {value:.4g}", color=LIGHT.of(name), fontsize=8.5)
        axis.axis("off")
    hide_what_overlaps(figure)
    return figure


def draw_curve(axes: Axes, result: Result, ink: Ink) -> None:
    """Distance against w on the selection seeds."""
    if result.choice.found is None:
        _draw_grid(axes, result, ink)
    else:
        _draw_search(axes, result, ink)
    axes.axvline(0, color=ink.faint, lw=1, zorder=0)
    axes.set_xlabel("w    (negative: towards the synthetic data;  positive: Neon)")
    _finish(axes, ink)
    axes.legend(frameon=False, fontsize=8, labelcolor=ink.text)


def _draw_search(axes: Axes, result: Result, ink: Ink) -> None:
    """The fit is drawn through where its points lie and dotted beyond; how many images a point has is in the legend:
    numbers beside points that are near to each other could not be read."""
    choice = result.choice
    assert choice.found is not None
    whole, snapshot = choice.found.whole, choice.point.snapshot
    w, values, errors = np.array([p.w for p in whole.places]), whole.values.numpy(), whole.draws.std(dim=0).numpy()
    own = [m for m in choice.measured if m.point.snapshot == snapshot or m.point.w == 0]
    fitted = [m.point.w for m in own if m.num_images >= choice.found.num_images]
    axes.plot(w, values, ":", color=ink.neon, lw=1.2)
    between = (w >= min(fitted)) & (w <= max(fitted))
    axes.fill_between(w, values - errors, values + errors, color=ink.neon, alpha=0.18, lw=0)
    axes.plot(w[between], values[between], color=ink.neon, lw=1.6, label="fitted moments, +- one standard error")
    for m in sorted(choice.measured, key=lambda m: -m.num_images):
        if math.isnan(m.value):
            axes.plot([m.point.w], [0.03], "x", color=ink.random, transform=axes.get_xaxis_transform(),
                      label="images were no numbers")  # fmt: skip
            continue
        is_fitted = m in own and m.num_images >= choice.found.num_images
        why = "" if is_fitted else ", not in the fit" if m in own else ", other snapshots"
        colour = ink.text if m in own else ink.base
        axes.errorbar([m.point.w], [m.value], yerr=[m.error], fmt="o" if m in own else "D", ms=5, capsize=3,
                      color=colour, mfc=colour if is_fitted else "none", label=f"{m.num_images:,} images{why}",
                      zorder=3)  # fmt: skip
    best = choice.found.surface
    axes.plot([choice.point.w], [float(best.values[best.best])], "o", ms=13, mfc="none", mec=ink.neon, mew=1.6,
              label=f"chosen: w = {choice.point.w:g}")  # fmt: skip
    axes.set_ylabel(_axis_label(choice), color=ink.text)
    seen = [m for m in choice.measured if not math.isnan(m.value)]
    low = min([float((values - errors).min()), *(m.value - m.error for m in seen)])
    high = max(m.value + m.error for m in seen)  # beyond its points the fit may go anywhere
    axes.set_ylim(low - 0.08 * (high - low or 1), high + 0.08 * (high - low or 1))


def _draw_grid(axes: Axes, result: Result, ink: Ink) -> None:
    """One line per snapshot and guidance; the chosen one strong."""
    choice, chosen = result.choice, result.choice.point
    finite = [s for s in choice.scores if s.failed is None]
    lines = {(s.point.snapshot, s.point.cfg_scale) for s in finite if s.point.direction == "synth"}
    for snapshot, cfg_scale in sorted(lines, key=lambda line: (int(line[0]), line[1] or 0.0)):
        own = [s for s in finite if is_on(s.point, snapshot, cfg_scale)]
        is_chosen = (snapshot, cfg_scale) == (chosen.snapshot, chosen.cfg_scale)
        label = f"{int(snapshot):,} images of fine-tuning" + ("" if cfg_scale is None else f", cfg {cfg_scale:g}")
        line = sorted((s.point.w, s.metrics[choice.metric]) for s in own)
        axes.plot(*zip(*line, strict=True), "o-", color=ink.neon if is_chosen else ink.base,
                  alpha=1.0 if is_chosen else 0.4, label=label, zorder=3 if is_chosen else 2)  # fmt: skip
    for s in finite:
        if s.point in choice.errors:
            is_chosen = (s.point.snapshot, s.point.cfg_scale) == (chosen.snapshot, chosen.cfg_scale)
            colour = ink.random if s.point.direction == "random" else ink.neon if is_chosen else ink.base
            axes.errorbar([s.point.w], [s.metrics[choice.metric]], yerr=[choice.errors[s.point]], fmt="none", capsize=3,
                          ecolor=colour, alpha=0.7 if is_chosen else 0.3)  # fmt: skip
        if s.point.direction == "random":
            axes.plot([s.point.w], [s.metrics[choice.metric]], "x", color=ink.random, ms=8, mew=2,
                      label="random direction of the same norm", zorder=4)  # fmt: skip
        elif s.point == chosen:
            axes.plot([s.point.w], [s.metrics[choice.metric]], "o", ms=14, mfc="none", mec=ink.text, mew=1.5,
                      label=f"chosen: w = {chosen.w:g}", zorder=5)  # fmt: skip
    axes.set_ylabel(choice.metric, color=ink.text)
    low, high = axes.dataLim.intervaly
    axes.set_ylim(low - 0.08 * (high - low or 1), high + 0.08 * (high - low or 1))


def draw_map(axes: Axes, result: Result, ink: Ink) -> None:
    """The fitted distance over (w, cfg_scale) with the evaluated points."""
    choice = result.choice
    assert choice.found is not None
    whole = choice.found.whole
    ws, scales = sorted({p.w for p in whole.places}), sorted({p.cfg_scale for p in whole.places})
    at = {(p.w, p.cfg_scale): float(v) for p, v in zip(whole.places, whole.values, strict=True)}
    values = np.array([[at[w, c] for w in ws] for c in scales])
    low, high = float(values.min()), float(np.quantile(values, 0.9))
    filled = axes.contourf(ws, scales, values, levels=_round_levels(low, max(high, low + 1e-9)), cmap="viridis_r",
                           extend="max")  # fmt: skip
    bar = axes.figure.colorbar(filled, ax=axes)
    bar.set_label(_axis_label(choice), color=ink.text, fontsize=8)
    bar.ax.tick_params(colors=ink.text, labelsize=8)
    sizes = {m.num_images for m in choice.measured}
    for m in sorted(choice.measured, key=lambda m: (math.isnan(m.value), m.value)):  # the lowest keep their labels
        place = m.point.w, m.point.cfg_scale or 0.0
        is_bad = math.isnan(m.value)
        face = "none" if is_bad else filled.to_rgba(np.array(m.value))
        axes.plot(*place, "X" if is_bad else "o", ms=10, color="white")  # seen on yellow and on purple
        axes.plot(*place, "x" if is_bad else "o", ms=6, mfc=face, mec="black", mew=0.8)
        is_right, is_top = place[0] > (ws[0] + ws[-1]) / 2, place[1] > (scales[0] + scales[-1]) / 2
        axes.annotate(
            _short(m, sizes),
            place,
            xytext=(-6 if is_right else 6, -7 if is_top else 7),
            textcoords="offset points",
            ha="right" if is_right else "left",
            va="top" if is_top else "bottom",
            fontsize=7,
            color="black",
            bbox={"boxstyle": "round,pad=0.15", "fc": "#ffffffb0", "lw": 0},
        )
    base, point = choice.found.base, choice.point
    axes.plot([0], [base.cfg_scale], "s", ms=9, mfc="white", mec=ink.base, mew=1.5, label="base, best guidance")
    axes.plot([point.w], [point.cfg_scale or 0.0], "*", ms=16, color=ink.neon, mec="white", label="chosen")
    axes.set_xlabel("w    (negative: towards the synthetic data;  positive: Neon)")
    axes.set_ylabel("guidance (cfg_scale)")
    _finish(axes, ink)
    axes.use_sticky_edges = False  # points on the edge are drawn whole
    axes.margins(0.04)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, labelcolor=ink.text, frameon=False)


def _axis_label(choice: Choice) -> str:
    where = "" if choice.components is None else f" on {choice.components} principal components"
    return f"{distance_name(choice)}{where}\nbias of few images taken off"


def distance_name(choice: Choice) -> str:
    """What is searched or tried: a search's points need not have the same number of images, so without it."""
    return choice.metric if choice.found is None else re.sub(r"\d+k?(?=\[)", "", choice.metric)


def _round_levels(low: float, high: float) -> Sequence[float]:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(12).tick_values(low, high)


def hide_what_overlaps(figure: Figure) -> None:
    """Of labels that lie on one another, the first stays."""
    figure.draw_without_rendering()  # places them
    for axes in figure.axes:
        shown: list[Bbox] = []
        for label in axes.texts:
            box = label.get_window_extent().padded(3)
            label.set_visible(not any(box.overlaps(other) for other in shown))
            shown += [box] if label.get_visible() else []


def _short(m: Measured, sizes: set[int]) -> str:
    """A point's label; the number of its images where the points differ in it, else the axis says it."""
    if math.isnan(m.value):
        return "no numbers"
    return f"{m.value:.3g}\n+- {m.error:.2g}" + (f"\nN = {m.num_images}" if len(sizes) > 1 else "")


def tile(images: Tensor, columns: int | None = None) -> np.ndarray:
    """One picture of n images: (H', W') or (H', W', 3) uint8, row by row, white between them."""
    n, channels, height, width = images.shape
    columns = columns or max(1, round(n**0.5))
    rows = -(-n // columns)
    canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        y, x = i // columns * (height + 1), i % columns * (width + 1)
        canvas[y : y + height, x : x + width] = image
    return canvas[..., 0] if channels == 1 else canvas


def caption(name: str, result: Result) -> str:
    return f"Neon (w = {result.neon.point.w:g})" if name == "neon" else CAPTIONS.get(name, name)


def _finish(axes: Axes, ink: Ink) -> None:
    """One legend entry per label, text in the page's colour, no frame."""
    seen: set[str] = set()
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        if label in seen:
            handle.set_label("_again")
        seen.add(label)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(ink.base)
    axes.tick_params(colors=ink.text)
    axes.xaxis.label.set_color(ink.text)
    axes.yaxis.label.set_color(ink.text)


def _blank(width: float, height: float, *, dpi: int) -> Figure:
    from matplotlib.figure import Figure  # here: half a second that `neon --help` need not wait

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def as_png(figure: Figure, *, transparent: bool = False) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=transparent)
    return buffer.getvalue()


def shrunk(images: Tensor, pixels: int) -> Tensor:
    """The first images of a set that fit into so many pixels, at least one."""
    return images[: max(1, pixels // (images.shape[-1] * images.shape[-2]))]
