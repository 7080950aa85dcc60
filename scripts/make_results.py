"""Write docs/results.md and its plots from results/*.json. The same files give the same bytes.

\b
python scripts/make_results.py [--out docs]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.evidence.jobs import FAMILIES, JOBS  # noqa: E402
from scripts.evidence.plot import Line, plot  # noqa: E402

FIRST, SECOND = "fashion-cnn", "pixel-pca64"
GATES = {"edm": 10, "flow": 10, "var": 25, "xar": 25, "imm": 25}
"""Base FD at its best sampler over real against real, at most."""
RECOGNISED = 0.8

INTRODUCTION = """# Results

Made by `python scripts/make_results.py` from `results/`; do not edit.

Every value here is a Frechet distance on the features of a small Fashion-MNIST classifier (`fashion-cnn`) or on 64
principal components of pixels (`pixel-pca64`). They can be compared with each other, not with published FIDs. The
number in a metric's name is the number of generated images; less is better. Precision and recall: k = 5, on
`fashion-cnn`. S, the search and the held-out noise use disjoint seeds; no reference image was in a training set.
"""


def metric(metrics: Mapping[str, float], kind: str, extractor: str) -> tuple[str, float]:
    """(name, value) of the one metric of this kind and extractor."""
    found = [(name, value) for name, value in metrics.items() if name.startswith(kind) and f"[{extractor}" in name]
    if len(found) != 1:
        raise ValueError(f"expected one {kind} with {extractor}, found {', '.join(metrics)}")
    return found[0]


def fd(metrics: Mapping[str, float], extractor: str = FIRST) -> float:
    return metric(metrics, "fd", extractor)[1]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def is_measured(part: object) -> bool:
    """Whether a measurement was made: not skipped, and without an error."""
    return part is not None and not (isinstance(part, Mapping) and "error" in part)


def base_section(found: Mapping, family: str) -> str:
    base = found["base"]
    best, floor = base["best"], base["real_against_real"]
    name, value = metric(best["metrics"], "fd", FIRST)
    ratio = value / floor[name]
    gate = "passed" if ratio <= GATES[family] else "MISSED"
    share = base["recognised"]
    rows = [
        [row["sampler"], number(row["cfg_scale"]), *(number(v) for v in row["metrics"].values())]
        for row in base["rows"]
    ]
    sampler = f"{best['sampler']}, guidance {number(best['cfg_scale'])}; {base['precision']}"
    return f"""Base at its best sampler ({sampler}): {name} = {number(value)}; real
against real {number(floor[name])}. Ratio {ratio:.1f}, gate {GATES[family]}: {gate}. Recognised by the classifier:
{100 * share:.1f} % (gate {100 * RECOGNISED:.0f} %: {"passed" if share >= RECOGNISED else "MISSED"}).

{table(["sampler", "guidance", *base["rows"][0]["metrics"]], rows)}

![samples of the base](../results/small/{found["job"]}_base.png)"""


def held_out(found: Mapping) -> list[tuple[str, Mapping]]:
    """(what it is, its row of w, cfg_scale and metrics) on the held-out noise."""
    rows = [(name, row) for name, row in found["main"]["rows"].items()]
    labels = {
        "seed1": "Neon, second S",
        "seed2": "Neon, third S",
        "synth_1000": "Neon, 1,000 images in S",
        "real_data": "the same fine-tune on real images, extrapolated",
        "synth_of_flow": "Neon, S of the flow model",
    }
    for key, label in labels.items():
        if is_measured(found.get(key)):
            rows.append((label, found[key]["rows"]["neon"]))
    return rows


def verdict(found: Mapping) -> str:
    """Whether Neon is below every control by more than the spread over S, in one sentence."""
    rows = dict(held_out(found))
    neon = [fd(rows[name]["metrics"]) for name in ("neon", "Neon, second S", "Neon, third S") if name in rows]
    controls = {name: fd(rows[name]["metrics"]) for name in ("base", "self-trained", "random direction")}
    name, least = min(controls.items(), key=lambda item: item[1])
    second = [fd(rows[row]["metrics"], SECOND) for row in ("base", "neon")]
    values = f"Neon's {FIRST}, {', '.join(number(v) for v in neon)}"
    against = f"the best control ({name}, {number(least)})"
    spread = max(neon) - min(neon)
    if len(neon) < 3:
        place = "below" if max(neon) < least else "NOT below"
        first_part = f"{values}, is {place} {against}; only {len(neon)} of 3 sets S was measured, so the spread is open"
    else:
        place = "below" if least - max(neon) > spread else "NOT below"
        first_part = f"{values} (three sets S), is {place} {against} by more than the spread ({number(spread)})"
    return f"""{first_part}. On {SECOND} Neon is {"not worse" if second[1] <= second[0] else "WORSE"} than the base
({number(second[0])} -> {number(second[1])}). The base's row is the base at its own best guidance."""


def main_section(found: Mapping, out: Path) -> str:
    main, job = found["main"], found["job"]
    rows = held_out(found)
    names = list(rows[0][1]["metrics"])
    body = [
        [label, f"{row['w']:g}", number(row["cfg_scale"]), *(number(row["metrics"][n]) for n in names)]
        for label, row in rows
    ]
    lines, what = curves(found), of_what(found)
    write(out / "results" / f"{job}_w.svg", plot(lines, x="w", y=what, marked=0.0))
    step = main["step"]["relative_step"]
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in found["seconds"].items())
    return f"""{verdict(found)}

{table(["held-out noise", "w", "guidance", *names], body)}

![{what}, against w](results/{job}_w.svg)

![the same noise through the base (upper half) and Neon (lower half)](../results/small/{job}_base_and_neon.png)

The fine-tune moves the weights by {100 * step:.2f} % of their norm. {recognised(found)}
Time on {found["device"]}, {at_commit(found)}: {seconds}.
{missing(found)}"""


def at_commit(found: Mapping) -> str:
    if "commit" not in found:
        return "commit not recorded"
    earlier = found.get("earlier")
    parts = f" ({', '.join(earlier['parts'])}: {earlier['commit'][:7]})" if earlier else ""
    return f"commit {found['commit'][:7]}{parts}"


def recognised(found: Mapping) -> str:
    part = found.get("recognised")
    if not is_measured(part):
        return ""
    return f"Recognised classes: base {100 * part['base']:.1f} %, Neon {100 * part['neon']:.1f} %. "


def missing(found: Mapping) -> str:
    failed = [name for name, part in found.items() if isinstance(part, Mapping) and "error" in part]
    parts = [f"Not measured: {', '.join(found['not_measured'])}."] if found.get("not_measured") else []
    return " ".join([*parts, *([f"Failed: {', '.join(failed)}."] if failed else [])])


def curves(found: Mapping) -> list[Line]:
    """Distance against w on the selection noise: the main run at its guidance, and every other that was measured."""
    points, errors = main_curve(found["main"])
    lines = [Line("Neon", points, errors)]
    labels = {"seed1": "second S", "seed2": "third S", "real_data": "real images", "synth_1000": "|S| = 1,000"}
    labels |= {key: key for key in found if key.startswith("sampler ")} | {"synth_of_flow": "S of flow"}
    for key, label in labels.items():
        if is_measured(found.get(key)):
            lines.append(Line(label, [(p["w"], fd(p["metrics"])) for p in found[key]["curve"]]))
    return lines


def of_what(found: Mapping) -> str:
    """What the lines of `curves` are: the search's fit and the other runs' grids are of different numbers of images."""
    select = found["main"]["select"]
    parts = [part for part in found.values() if is_measured(part) and "curve" in part]
    names = sorted({metric(p["metrics"], "fd", FIRST)[0] for part in parts for p in part["curve"]})
    if select.get("strategy") != "search":
        return ", ".join(sorted({select["metric"], *names}))
    sizes = sorted({m["num_images"] for m in select["measured"]})
    images = "-".join(f"{n}" for n in sorted({sizes[0], sizes[-1]}))
    others = f"; others: {', '.join(names)}" if names else f", {FIRST}"
    return f"Neon: fitted, {images} images a point, bias taken off, +- one error{others}"


def main_curve(main: Mapping) -> tuple[list[tuple[float, float]], list[float]]:
    """(w, distance) on the selection noise at the chosen guidance, and their errors: the grid's points (which have
    none), or what the search fitted."""
    select, cfg_scale = main["select"], main["cfg_scale"]
    if select.get("strategy") != "search":
        at = [p for p in select["points"] if p["direction"] == "synth" and p["cfg_scale"] == cfg_scale]
        return sorted((p["w"], p["metrics"][select["metric"]]) for p in at), []
    scales = {p["cfg_scale"] for p in select["fitted"]}
    nearest = None if None in scales else min(scales, key=lambda scale: abs(scale - cfg_scale))
    fitted = sorted((p["w"], p["value"], p["error"]) for p in select["fitted"] if p["cfg_scale"] == nearest)
    return [(w, value) for w, value, _ in fitted], [error for *_, error in fitted]


def laws(found: Mapping) -> str:
    """What the paper says, as measured in this family."""
    main, parts = found["main"], []
    curve, _ = main_curve(main)
    values = [value for _, value in curve]
    lowest = values.index(min(values))
    falls = all(a >= b for a, b in pairwise(values[: lowest + 1]))
    rises = all(a <= b for a, b in pairwise(values[lowest:]))
    inside = 0 < lowest < len(values) - 1
    parts.append(f"- U-shape in w: {'yes' if falls and rises and inside else 'no'}; least at w = {curve[lowest][0]:g}.")
    rows = {name: main["rows"][name]["metrics"] for name in ("base", "neon")}
    if any(name.startswith("recall") for name in rows["base"]):
        pairs = {kind: [metric(rows[n], kind, FIRST)[1] for n in ("base", "neon")] for kind in ("precision", "recall")}
        text = ", ".join(f"{kind} {a:.3f} -> {b:.3f}" for kind, (a, b) in pairs.items())
        agrees = pairs["recall"][1] > pairs["recall"][0] and pairs["precision"][1] < pairs["precision"][0]
        parts.append(f"- Recall up, precision down from the base to Neon: {'yes' if agrees else 'no'} ({text}).")
    samplers = {key: part for key, part in found.items() if key.startswith("sampler ") and is_measured(part)}
    if samplers:
        own = f"the config's sampler: w = {main['w']:g}"
        others = [
            f"{key.removeprefix('sampler ')}: w = {part['w']:g} (parabola {number(part['parabola_w'])})"
            for key, part in samplers.items()
        ]
        parts.append(f"- Best w by sampler: {'; '.join([own, *others])}.")
    if is_measured(found.get("snapshots")):
        pairs_of = [f"{s['images']:,} images: {number(s['parabola_w'])}" for s in found["snapshots"]]
        parts.append(
            f"- Best w (parabola) along the fine-tune (theory: it falls as the step grows): {'; '.join(pairs_of)}."
        )
    return "\n".join(parts)


def family_section(found: Mapping, trained: Mapping | None, out: Path) -> str:
    job = JOBS[found["job"]]
    title = f"## {found['job']} ({job.family})" if job.is_repeat else f"## {job.family}"
    parts = [title, f"`scripts/reproduce/small/{job.family}.sh`; numbers: `results/small/{found['job']}.json`."]
    if trained is not None:
        images = f"{trained['images_seen']:,} images"
        parts.append(f"Trained on {images} in {trained['seconds']:.0f} s, with others beside it on the GPU:")
        parts.append(f"    {trained['command']}")
    if is_measured(found.get("base")):
        parts.append(base_section(found, job.family))
    if is_measured(found.get("main")):
        parts += [main_section(found, out), laws(found)]
    else:
        parts.append("Neon was not measured on this base.")
    if "tried" in found:
        parts.append("What was tried:\n\n" + "\n".join(f"- {line}." for line in found["tried"]))
    return "\n\n".join(parts)


def demo_section(demo: Mapping) -> str:
    rows = []
    for steps, runs in demo["steps"].items():
        for run in runs:
            base, neon = run["rows"]["base"]["metrics"], run["rows"]["neon"]["metrics"]
            cells = [f"{number(base[name])} -> {number(neon[name])}" for name in base]
            rows.append([steps, run["synth_seed"], f"{run['w']:g}", *cells])
    names = list(demo["steps"]["8"][0]["rows"]["base"]["metrics"])
    real = ", ".join(f"{name} {number(value)}" for name, value in demo["real_against_real"].items())
    return f"""## The demo's small base

`{demo["command"]}` ({demo["machine"]}). Real against real: {real}.

{table(["steps", "S", "w", *(f"{name}, base -> Neon" for name in names)], rows)}"""


def published_section(rows: Sequence[Mapping]) -> str:
    body = []
    for row in rows:
        images, hours = row["images_sampled"], row["h100_hours"]
        body.append(
            [
                row["title"],
                f"{row['published_base']} -> {row['published_neon']}",
                f"`{row['command']}`",
                f"{sum(images.values()):,}",
                f"{row['images_trained']:,}",
                f"{sum(hours.values()):.1f}",
                row["status"],
            ]
        )
    head = ["row", "published FID", "command", "images sampled", "images trained", "H100 hours", "status"]
    share = rows[0]["assumed"]["share_of_peak"]
    return f"""## The published rows

FIDs of arXiv 2510.03597 (base -> Neon, 50,000 images). Hardware: 8 GPUs of 80 GB; divide the hours by their number.
Images are those of the whole loop of the config (S, every point of the search, four rows of the report). Hours follow
from the floating-point operations of the networks, counted by `scripts/published_cost.py`, at {100 * share:.0f} % of
an H100's peak rate in the config's precision. The autoencoder and the feature network are not counted.

{table(head, body)}"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def page(results: Path, out: Path) -> str:
    files = [results / "small" / f"{name}.json" for name in JOBS]
    families = [json.loads(file.read_text()) for file in files if file.is_file()]
    families.sort(key=lambda found: FAMILIES.index(JOBS[found["job"]].family))
    absent = [name for name in FAMILIES if name not in {JOBS[found["job"]].family for found in families}]
    sections = [INTRODUCTION.strip()]
    for found in families:
        trained = results / "small" / f"train-{found['job']}.json"
        sections.append(family_section(found, json.loads(trained.read_text()) if trained.is_file() else None, out))
    if absent:
        sections.append(f"Not measured yet: {', '.join(absent)} (`scripts/reproduce/small/FAMILY.sh measure`).")
    sections.append(demo_section(json.loads((results / "demo.json").read_text())))
    sections.append(published_section(json.loads((results / "published.json").read_text())))
    return "\n\n".join(sections) + "\n"


@click.command(help=__doc__)
@click.option("--results", type=click.Path(path_type=Path), default=ROOT / "results")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "docs")
def main(results: Path, out: Path) -> None:
    write(out / "results.md", page(results, out))


if __name__ == "__main__":
    main()
