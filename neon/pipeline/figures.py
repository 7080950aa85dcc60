"""The figures of a run: the curve over w, and the same noise through each model."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BASE, NEON, RANDOM, SYNTH = "#1b1b1f", "#6b7280", "#c2185b", "#b08900", "#1565c0"


COLOURS = {"base": BASE, "self-trained": SYNTH, "random direction": RANDOM, "neon": NEON}


CAPTIONS = {"base": "base (w = 0)", "self-trained": "self-trained (w = -1)", "neon": "Neon"}


def curve_figure(result: Mapping) -> Figure:
    """Frechet distance against w on the selection block: one line per snapshot at the chosen guidance, with
    controls."""
    figure = _blank(7.5, 4.2, dpi=130)
    draw_curve(figure.add_subplot(), result)
    return figure


def summary_figure(result: Mapping, pictures: Mapping[str, Tensor]) -> Figure:
    """The curve beside the same noise through base, self-trained model and Neon: one picture that says what
    happened."""
    figure = _blank(15, 3.9, dpi=120)
    names = [name for name in ("self-trained", "base", "neon") if name in pictures]
    axes = figure.subplots(1, 1 + len(names), width_ratios=[1.25, *(1 for _ in names)], squeeze=False)[0]
    draw_curve(axes[0], result)
    for axis, name in zip(axes[1:], names, strict=True):
        axis.imshow(tile(pictures[name]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(
            f"{caption(name, result)}: {result['rows'][name]['metrics'][result['metric']]:.4g}",
            color=COLOURS[name],
            fontsize=11,
        )
        axis.axis("off")
    return figure


def draw_curve(axes: Axes, result: Mapping) -> None:
    select, chosen_cfg = result["select"], result["cfg_scale"]
    metric = select["metric"]
    shots = sorted({p["snapshot"] for p in select["points"]}, key=int)
    base = next(p["metrics"][metric] for p in select["points"] if p["w"] == 0 and p["cfg_scale"] == chosen_cfg)
    for i, snapshot in enumerate(shots):
        curve = [
            p
            for p in select["points"]
            if p["snapshot"] == snapshot and p["direction"] == "synth" and p["cfg_scale"] == chosen_cfg
        ]
        line = dict(sorted({**{p["w"]: p["metrics"][metric] for p in curve}, 0.0: base}.items()))
        is_chosen = int(snapshot) == result["snapshot_images"]
        label = f"{int(snapshot):,} images of fine-tuning" if is_chosen or len(shots) < 4 else None
        colour, alpha = (NEON, 1.0) if is_chosen else ("#d9a0b8", 0.35 + 0.5 * i / len(shots))
        axes.plot(
            list(line), list(line.values()), "o-", color=colour, alpha=alpha, label=label, zorder=3 if is_chosen else 2
        )
    _mark_controls(axes, result, metric, base)
    axes.set_xlabel("w    (negative: towards the synthetic data;  positive: Neon)")
    axes.set_ylabel(metric)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _mark_controls(axes: Axes, result: Mapping, metric: str, base: float) -> None:
    axes.axhline(base, color=BASE, lw=1, ls="--", zorder=1, label="base")
    axes.axvline(0, color="#dddddd", lw=1, zorder=0)
    chosen = (result["w"], result["cfg_scale"], result["snapshot_images"])
    for p in result["select"]["points"]:
        value = p["metrics"][metric]
        if p["direction"] == "random":
            axes.plot(
                [p["w"]], [value], "x", color=RANDOM, ms=8, mew=2, label="random direction of the same norm", zorder=4
            )
        elif (p["w"], p["cfg_scale"], int(p["snapshot"])) == chosen:
            axes.plot(
                [p["w"]], [value], "o", ms=14, mfc="none", mec=INK, mew=1.5, label=f"chosen: w = {p['w']:g}", zorder=5
            )


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


def caption(name: str, result: Mapping) -> str:
    return f"Neon (w = {result['w']:g})" if name == "neon" else CAPTIONS[name]


def _blank(width: float, height: float, *, dpi: int) -> Figure:
    from matplotlib.figure import Figure  # here: half a second that `neon --help` need not wait

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
