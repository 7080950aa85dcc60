"""The page of a run: curve, pictures with the same noise, table and protocol in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from neon import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BASE, NEON, RANDOM, SYNTH = "#1b1b1f", "#6b7280", "#c2185b", "#b08900", "#1565c0"
COLOURS = {"base": BASE, "self-trained": SYNTH, "random direction": RANDOM, "neon": NEON}
CAPTIONS = {"base": "base (w = 0)", "self-trained": "self-trained (w = -1)", "neon": "Neon"}


def write_page(result: Mapping, pictures: Mapping[str, Tensor], path: Path) -> None:
    """Write the page of a result (neon/run.py), and its summary as a .png beside it.

    pictures: row name -> uint8 images (n, C, H, W) of the same seeds.
    """
    curve = _data_uri(curve_figure(result))
    grids = "".join(_figure(name, images, result) for name, images in pictures.items() if name != "random direction")
    verdict = "comparable with published FIDs" if result["comparable"] else f"not comparable with published FIDs: {result['reason']}"
    neon, base = result["value"], result["base_value"]
    protocol = json.dumps({k: v for k, v in result.items() if k not in ("rows", "select")}, indent=1)
    body = f"""<h1>Neon: {html.escape(result["config"]["family_name"])}</h1>
<p class="summary">On held-out noise {html.escape(result["metric"])} goes from <b>{base:.4g}</b> (base) to <b>{neon:.4g}</b>
(Neon, w = {result["w"]:g}): {100 * (neon / base - 1):+.0f} %. These values are {html.escape(verdict)}.</p>
<p>The model sampled a synthetic set, was fine-tuned on it for a moment, and was then moved the other way:
<code>{html.escape(result["formula"])}</code>. w = 0 is the base, w = -1 the self-trained model.</p>
<img class="plot" src="{curve}" alt="Frechet distance against w">
<h2>Held-out noise</h2>{_table(result)}
<h2>The same noise through each model</h2><div class="grids">{grids}</div>
<h2>Protocol</h2><details><summary>Everything that these numbers depend on</summary><pre>{html.escape(protocol)}</pre></details>"""
    files.write_text(path, _PAGE.replace("BODY", body))
    with files.replacing(path.with_suffix(".png")) as stream:
        stream.write(_png(summary_figure(result, pictures)))


def curve_figure(result: Mapping) -> Figure:
    """Frechet distance against w on the selection block: one line per snapshot at the chosen guidance, with controls."""
    figure = _blank(7.5, 4.2, dpi=130)
    draw_curve(figure.add_subplot(), result)
    return figure


def summary_figure(result: Mapping, pictures: Mapping[str, Tensor]) -> Figure:
    """The curve beside the same noise through base, self-trained model and Neon: one picture that says what happened."""
    figure = _blank(15, 3.9, dpi=120)
    names = [name for name in ("self-trained", "base", "neon") if name in pictures]
    axes = figure.subplots(1, 1 + len(names), width_ratios=[1.25, *(1 for _ in names)])
    draw_curve(axes[0], result)
    for axis, name in zip(axes[1:], names, strict=True):
        axis.imshow(tile(pictures[name]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(
            f"{_caption(name, result)}: {result['rows'][name]['metrics'][result['metric']]:.4g}", color=COLOURS[name], fontsize=11
        )
        axis.axis("off")
    return figure


def draw_curve(axes: Axes, result: Mapping) -> None:
    select, chosen_cfg = result["select"], result["cfg_scale"]
    metric = select["metric"]
    shots = sorted({p["snapshot"] for p in select["points"]}, key=int)
    base = next(p["metrics"][metric] for p in select["points"] if p["w"] == 0 and p["cfg_scale"] == chosen_cfg)
    for i, snapshot in enumerate(shots):
        curve = [p for p in select["points"] if p["snapshot"] == snapshot and p["direction"] == "synth" and p["cfg_scale"] == chosen_cfg]
        line = dict(sorted({**{p["w"]: p["metrics"][metric] for p in curve}, 0.0: base}.items()))
        is_chosen = int(snapshot) == result["snapshot_images"]
        label = f"{int(snapshot):,} images of fine-tuning" if is_chosen or len(shots) < 4 else None
        colour, alpha = (NEON, 1.0) if is_chosen else ("#d9a0b8", 0.35 + 0.5 * i / len(shots))
        axes.plot(list(line), list(line.values()), "o-", color=colour, alpha=alpha, label=label, zorder=3 if is_chosen else 2)
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
            axes.plot([p["w"]], [value], "x", color=RANDOM, ms=8, mew=2, label="random direction of the same norm", zorder=4)
        elif (p["w"], p["cfg_scale"], int(p["snapshot"])) == chosen:
            axes.plot([p["w"]], [value], "o", ms=14, mfc="none", mec=INK, mew=1.5, label=f"chosen: w = {p['w']:g}", zorder=5)


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


def _table(result: Mapping) -> str:
    names = list(next(iter(result["rows"].values()))["metrics"])
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    base = result["rows"]["base"]["metrics"]
    rows = ""
    for name, row in result["rows"].items():
        values = row["metrics"]
        cells = "".join(f"<td>{values[m]:.4g}<small>{_change(values[m], base[m], name)}</small></td>" for m in names)
        cfg = "" if row["cfg_scale"] is None else f", cfg {row['cfg_scale']:g}"
        rows += f'<tr><td style="color:{COLOURS[name]}">{name}</td><td>w = {row["w"]:g}{cfg}</td>{cells}</tr>'
    return f"<table><tr><th></th><th></th>{head}</tr>{rows}</table>"


def _change(value: float, base: float, name: str) -> str:
    return "" if name == "base" or base == 0 else f" ({100 * (value / base - 1):+.0f} %)"


def _caption(name: str, result: Mapping) -> str:
    return f"Neon (w = {result['w']:g})" if name == "neon" else CAPTIONS[name]


def _figure(name: str, images: Tensor, result: Mapping) -> str:
    picture = f'<img src="{_image_uri(tile(images))}" alt="{html.escape(name)} samples">'
    return f"<figure>{picture}<figcaption>{html.escape(_caption(name, result))}</figcaption></figure>"


def _blank(width: float, height: float, *, dpi: int) -> Figure:
    from matplotlib.figure import Figure  # here: half a second that `neon --help` need not wait

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def _data_uri(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(figure)).decode()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _image_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Neon</title><style>
body{font:16px/1.5 system-ui,sans-serif;color:#1b1b1f;max-width:62rem;
margin:2rem auto;padding:0 1rem}
h1{font-weight:650;letter-spacing:-.01em}h2{margin-top:2.2rem;font-size:1.15rem}.summary{font-size:1.1rem}
.plot{max-width:100%}table{border-collapse:collapse}td,th{padding:.3rem .9rem .3rem 0;text-align:left;border-bottom:1px solid #e5e5ea}
th{font-weight:500;font-size:.85rem}td small{color:#6b7280}.grids{display:flex;gap:1.2rem;flex-wrap:wrap}
figure{margin:0;flex:1 1 16rem;max-width:20rem}
figure img{width:100%;image-rendering:pixelated}figcaption{font-size:.9rem;color:#444}
pre{overflow:auto;background:#f6f6f8;padding:1rem;font-size:.8rem}
</style></head><body>BODY</body></html>
"""
