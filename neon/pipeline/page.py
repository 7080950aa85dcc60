"""The page of a run: curve, pictures with the same noise, table and protocol in one HTML file that needs nothing
else."""

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

from neon.pipeline.figures import COLOURS, as_png, caption, curve_figure, summary_figure, tile
from neon.store import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, BASE, NEON, RANDOM, SYNTH = "#1b1b1f", "#6b7280", "#c2185b", "#b08900", "#1565c0"


def write_page(result: Mapping, pictures: Mapping[str, Tensor], path: Path) -> None:
    """Write the page of a result (neon/pipeline/run.py), and its summary as a .png beside it.

    pictures: row name -> uint8 images (n, C, H, W) of the same seeds.
    """
    curve = _data_uri(curve_figure(result))
    grids = "".join(_figure(name, images, result) for name, images in pictures.items() if name != "random direction")
    verdict = (
        "comparable with published FIDs"
        if result["comparable"]
        else f"not comparable with published FIDs: {result['reason']}"
    )
    neon, base = result["value"], result["base_value"]
    protocol = json.dumps({k: v for k, v in result.items() if k not in ("rows", "select")}, indent=1)
    body = f"""<h1>Neon: {html.escape(result["config"]["family_name"])}</h1>
<p class="summary">On held-out noise {html.escape(result["metric"])} goes from <b>{base:.4g}</b> (base) to
<b>{neon:.4g}</b> (Neon, w = {result["w"]:g}): {100 * (neon / base - 1):+.0f} %. These values are
{html.escape(verdict)}.</p>
<p>The model sampled a synthetic set, was fine-tuned on it for a moment, and was then moved the other way:
<code>{html.escape(result["formula"])}</code>. w = 0 is the base, w = -1 the self-trained model.</p>
<img class="plot" src="{curve}" alt="Frechet distance against w">
<h2>Held-out noise</h2>{_table(result)}
<h2>The same noise through each model</h2><div class="grids">{grids}</div>
<h2>Protocol</h2><details><summary>Everything that these numbers depend
on</summary><pre>{html.escape(protocol)}</pre></details>"""
    files.write_text(path, _PAGE.replace("BODY", body))
    with files.replacing(path.with_suffix(".png")) as stream:
        stream.write(as_png(summary_figure(result, pictures)))


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


def _figure(name: str, images: Tensor, result: Mapping) -> str:
    picture = f'<img src="{_image_uri(tile(images))}" alt="{html.escape(name)} samples">'
    return f"<figure>{picture}<figcaption>{html.escape(caption(name, result))}</figcaption></figure>"


def _data_uri(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(as_png(figure)).decode()


def _image_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Neon</title><style>
body{font:16px/1.5 system-ui,sans-serif;color:#1b1b1f;max-width:62rem;
margin:2rem auto;padding:0 1rem}
h1{font-weight:650;letter-spacing:-.01em}h2{margin-top:2.2rem;font-size:1.15rem}.summary{font-size:1.1rem}
.plot{max-width:100%}table{border-collapse:collapse}td,th{padding:.3rem .9rem .3rem 0;text-align:left;border-bottom:1px
solid #e5e5ea}
th{font-weight:500;font-size:.85rem}td small{color:#6b7280}.grids{display:flex;gap:1.2rem;flex-wrap:wrap}
figure{margin:0;flex:1 1 16rem;max-width:20rem}
figure img{width:100%;image-rendering:pixelated}figcaption{font-size:.9rem;color:#444}
pre{overflow:auto;background:#f6f6f8;padding:1rem;font-size:.8rem}
</style></head><body>BODY</body></html>
"""
