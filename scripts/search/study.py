"""Does the search find what the dense grid finds? For five seeds or more each of three models, by the search itself.

\b
python scripts/search/study.py toy        # trains the toy models, seconds per seed
python scripts/search/study.py demo       # needs scripts/search/dense.py configs/demo.toml ... (see there)
python scripts/search/study.py var        # likewise, configs/small/var.toml
python scripts/search/study.py table      # writes docs/search.md from results/search/*.json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fid.frechet import Gaussian  # noqa: E402
from neon import reverse_merge  # noqa: E402
from neon.pipeline.run import Run  # noqa: E402
from neon.report.result import selection  # noqa: E402
from neon.runtime.distributed import World, world  # noqa: E402
from neon.search.choose import plan_of  # noqa: E402
from neon.search.options import Select  # noqa: E402
from neon.search.strategy import Search  # noqa: E402
from neon.search.surface import Place, Surface, joined, surface  # noqa: E402
from neon.toy.autoregressive import Autoregressive  # noqa: E402
from neon.toy.diffusion import Diffusion  # noqa: E402
from neon.toy.experiment import Model, evaluation_noise, self_train, train_base  # noqa: E402
from neon.toy.stack import Weights, split  # noqa: E402
from neon.toy.target import COVARIANCE, real_points  # noqa: E402
from scripts.evidence.jobs import JOBS  # noqa: E402
from scripts.search.dense import seeded  # noqa: E402

RESULTS, STUDY = ROOT / "results" / "search", ROOT / "runs" / "search-study"
TOY_REPORT, TOY_BLOCKS = 10_000, (10_000, 500)
"""Images of the report and of the truth; of the selection block, which is what the fixed grid takes at every point. The
first block has a budget of a tenth of the authors' images, the second its default, a third of the grid's."""
TOY_GRID = (0.5, 1.0, 1.5, 2.0)
TOY_AUTHORS = 13 * TOY_REPORT
DEMO_GRID = ("select.w=[0.5,1,1.5,2]", "select.num_images=500")
DEMO_BUDGET = ("select.budget_images=1166",)
"""A third of that grid's images; the config's own 1,200 are meant for blocks of 600."""
VAR_SHORT = (
    "synth.num_images=500",
    "sampling.batch=100",
    "sampling.precision=fp32",
    "finetune.images=1280",
    "finetune.batch=64",
    "finetune.lr=4e-4",
    "finetune.lr_ramp_images=320",
    "finetune.snapshot_images=1280",
    "finetune.precision=fp32",
    "select.strategy=search",
    "report.num_images=2000",
)
"""The settings of `dense.py configs/small/var.toml`: one --set each."""
TOY_SETTINGS = (
    ("diffusion, zeta 1.1 (mode-seeking)", Diffusion(), 1.1, 4_000, 1_000, 5e-6),
    ("diffusion, zeta 0.9 (diversity-seeking)", Diffusion(), 0.9, 4_000, 1_000, 5e-6),
    ("autoregressive, tau 0.5 (mode-seeking)", Autoregressive(), 0.5, 1_000, 100, 2e-4),
    ("autoregressive, tau 1.6 (diversity-seeking)", Autoregressive(), 1.6, 1_000, 100, 2e-4),
)


def judged(dense: Surface, choice: Place, others: dict[str, Place]) -> dict[str, object]:
    """A choice against the dense grid's minimum, on the dense grid's noise: paired, so the difference is sharp."""
    best = dense.best
    found: dict[str, object] = {
        "dense_place": [dense.places[best].w, dense.places[best].cfg_scale],
        "dense_value": float(dense.values[best]),
        "dense_noise": dense.noise,
        "base_value": float(dense.values[nearest(dense, Place(0.0, dense.places[best].cfg_scale))]),
    }
    for name, place in {"search": choice, **others}.items():
        index = nearest(dense, place)
        difference, error = dense.difference(index, best)
        found[name] = {"place": [place.w, place.cfg_scale], "regret": difference, "error": error}
    return found


def nearest(dense: Surface, place: Place) -> int:
    return min(
        range(len(dense.places)),
        key=lambda i: (abs(dense.places[i].cfg_scale - place.cfg_scale), abs(dense.places[i].w - place.w)),
    )


def parabola(ws: Sequence[float], values: Sequence[float]) -> float:
    """Vertex of the parabola through the lowest value and its neighbours; the lowest value's w at an end."""
    i = int(np.argmin(values))
    if i in (0, len(ws) - 1):
        return ws[i]
    a, b, _ = np.polyfit(ws[i - 1 : i + 2], values[i - 1 : i + 2], 2)
    return float(-b / (2 * a)) if a > 0 else ws[i]


def toy_cases(name: str, model: Model, base: Weights, tuned: Weights, seed: int) -> list[dict[str, object]]:
    """One replica: the truth at 41 values of w from 10,000 points each; the search, as `neon search` plans it, and the
    fixed grid on others, for either size of the selection block."""
    reference = Gaussian(torch.zeros(2), COVARIANCE)
    noise = evaluation_noise(TOY_REPORT, seed=1_000 + seed)
    held_out = evaluation_noise(TOY_REPORT, seed=2_000 + seed)

    def points(w: float, source: Tensor) -> Tensor:
        return model.sample(reverse_merge(base, tuned, w), source)[0]

    rows, choices = [], []
    for block in TOY_BLOCKS:
        budget = TOY_AUTHORS // 10 if block == TOY_REPORT else None
        select = Select(w=TOY_GRID, num_images=block, first_seed=0, labels="drawn", budget_images=budget)
        plan = plan_of(select, 1, 2, 0, TOY_REPORT)
        found = Search(
            plan, reference, lambda place, images: points(place.w, noise[:, images.start : images.stop])
        ).run()
        grid = sorted({-1.0, 0.0, *TOY_GRID})
        scores = [float(exact_surface(Place(w), points(w, noise[:, :block]), reference).values[0]) for w in grid]
        others = {"grid": Place(grid[int(np.argmin(scores))]), "parabola": Place(parabola(grid, scores))}
        choices.append((found.place, others))
        rows.append(
            {
                "case": f"{name}, block of {block:,}",
                "seed": seed,
                "ended_by": found.reason,
                "images": found.images_spent,
                "grid_images": (len(grid) + 1) * block,
                "authors_images": TOY_AUTHORS,
            }
        )
    chosen = {place.w for place, others in choices for place in (place, *others.values())}
    ws = sorted({*torch.linspace(-3, 3, 41).tolist(), *chosen})
    dense = joined([exact_surface(Place(w), points(w, held_out), reference) for w in ws])
    return [row | judged(dense, *choice) for row, choice in zip(rows, choices, strict=True)]


def exact_surface(place: Place, points: Tensor, reference: Gaussian) -> Surface:
    return surface([place], points[None], reference, [place])


def toy_replicas() -> Iterator[tuple[str, Model, float, int, Weights, Weights]]:
    """(name, model, knob of the sampler of S, seed, base, tuned): five of each setting."""
    for name, model, knob, steps, num_points, lr in TOY_SETTINGS:
        base = train_base(model, real_points(5, num_points, seed=1), steps=steps, lr=1e-3, seed=0)
        tuned = self_train(model, base, [knob], num_synthetic=5_000, budgets=[50], lr=lr, seed=3)[50][knob]
        for seed, (b, t) in enumerate(zip(split(base, 5), split(tuned, 5), strict=True)):
            yield name, model, knob, seed, b, t


def toy() -> list[dict[str, object]]:
    found = []
    for name, model, _, seed, base, tuned in toy_replicas():
        found += toy_cases(name, model, base, tuned, seed)
        click.echo(json.dumps(found[-2:]), err=True)
    return found


def dense_features(folder: Path, seed: int) -> tuple[list[Place], Tensor]:
    """The dense grid's places and features (P, N, D) of one seed."""
    files = [*(folder / "dense-base").glob("*.npy"), *(folder / f"seed-{seed}" / "dense").glob("*.npy")]
    places, rows = [], []
    for file in sorted(files):
        w, cfg = file.stem.removeprefix("w").split("-cfg")
        places.append(Place(float(w), 0.0 if cfg == "None" else float(cfg)))
        rows.append(torch.from_numpy(np.load(file)))
    count = min(map(len, rows))
    return places, torch.stack([r[:count] for r in rows])


def real_case(
    config: Path,
    folder: Path,
    seed: int,
    ranks: World,
    overrides: tuple[str, ...],
    authors: int,
    fixed_grid: tuple[str, ...] | None,
) -> dict[str, object]:
    """One seed of a model with images: `neon search` on the config's selection seeds against the dense grid."""
    run = seeded(config, seed, folder, ranks, overrides)
    run.finetune()
    choice = run.select()
    assert choice.found is not None
    places, features = dense_features(folder, seed)
    reference = run.yardsticks[0].reference
    assert reference is not None
    values = torch.cat(
        [surface([p], f[None], reference, [p], num_classes=10).values for p, f in zip(places, features, strict=True)]
    )
    trust = (values / values.min()) ** -2
    ws = torch.linspace(min(p.w for p in places), max(p.w for p in places), 81).tolist()
    cfgs = sorted({p.cfg_scale for p in places})
    scales = cfgs if len(cfgs) == 1 else torch.linspace(cfgs[0], cfgs[-1], 17).tolist()
    fine = [Place(w, c) for c in scales for w in ws]
    dense = surface(places, features, reference, fine, num_classes=10, trust=trust)
    grid = run.config.select if fixed_grid is None else with_grid(config, seed, folder, ranks, fixed_grid).config.select
    assert grid is not None
    return {
        "case": config.stem,
        "seed": seed,
        "ended_by": choice.found.reason,
        "images": choice.found.images_spent,
        "grid_images": grid_images(grid.w, grid.cfg_scale, grid.num_images),
        "authors_images": authors,
        "dense_images": features.shape[1],
        **judged(
            dense,
            choice.found.place,
            {} if fixed_grid is None else grid_choice(config, seed, folder, ranks, fixed_grid),
        ),
    }


def grid_images(ws: Sequence[float], cfg_scales: Sequence[float] | None, num_images: int) -> int:
    """Of the fixed grid on these values, with one point for the random direction."""
    return (len({0.0, -1.0, *ws}) * len(cfg_scales or (None,)) + 1) * num_images


def with_grid(config: Path, seed: int, folder: Path, ranks: World, fixed_grid: tuple[str, ...]) -> Run:
    return seeded(config, seed, folder, ranks, ("select.strategy=grid", *fixed_grid))


def grid_choice(config: Path, seed: int, folder: Path, ranks: World, fixed_grid: tuple[str, ...]) -> dict[str, Place]:
    """What the fixed grid chooses on the same synthetic set, and the parabola through its lowest values."""
    choice = with_grid(config, seed, folder, ranks, fixed_grid).select()
    ws = selection(choice)["parabola_w"]
    return {"grid": Place(choice.point.w)} | ({"parabola": Place(ws)} if isinstance(ws, float) else {})


def demo(ranks: World) -> list[dict[str, object]]:
    return _real(ROOT / "configs" / "demo.toml", STUDY / "demo", ranks, DEMO_BUDGET, 13 * 10_000, DEMO_GRID)


def var(ranks: World) -> list[dict[str, object]]:
    """20 updates of 64 images instead of 200 of 128, at four times the rate: what a CPU can pay for some times."""
    return _real(ROOT / "configs" / "small" / "var.toml", STUDY / "var", ranks, VAR_SHORT, 17 * 14 * 10_000, None)


def _real(
    config: Path,
    folder: Path,
    ranks: World,
    overrides: tuple[str, ...],
    authors: int,
    fixed_grid: tuple[str, ...] | None,
) -> list[dict[str, object]]:
    """fixed_grid: the settings of a grid that is run beside the search; None: only its images are counted."""
    found = []
    seeds = sorted(int(own.name.removeprefix("seed-")) for own in folder.glob("seed-*"))
    done = {seed: len(list((folder / f"seed-{seed}" / "dense").glob("*.npy"))) for seed in seeds}
    for seed, num_places in done.items():
        if num_places < max(1, *done.values()):
            places = max(done.values())
            click.echo(f"{folder}: {num_places} of {places} places of seed {seed}'s dense grid; left out", err=True)
            continue
        found.append(real_case(config, folder, seed, ranks, overrides, authors, fixed_grid))
        click.echo(json.dumps(found[-1]), err=True)
    return found


def table(cases: Sequence[dict]) -> str:
    """Markdown: every seed, not the best."""
    lines = [
        "| model | seed | ended by | images | of the authors' | of the fixed grid's | chosen | dense grid's best | "
        "base FD | dense minimum | search above it | grid above it | parabola above it |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in cases:

        def above(name: str, c: dict = c) -> str:
            return f"{c[name]['regret']:.3g} +- {c[name]['error']:.2g}" if name in c else "-"

        cells = [
            *(c["case"], c["seed"], c["ended_by"], f"{c['images']:,}"),
            f"1/{c['authors_images'] / c['images']:.0f}",
            f"{c['images'] / c['grid_images']:.2f}",
            *(_place(c["search"]["place"]), _place(c["dense_place"])),
            f"{c['base_value']:.3g}",
            f"{c['dense_value']:.3g} +- {c['dense_noise']:.2g}",
            *(above(name) for name in ("search", "grid", "parabola")),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _place(place: Sequence[float]) -> str:
    return f"w {place[0]:.2f}" + ("" if place[1] == 0 else f", cfg {place[1]:.2f}")


def summary(cases: Sequence[dict]) -> str:
    """One line per model: how many seeds are within the noise, for how much, and the means of what lies above the
    minimum."""
    lines = []
    for case in dict.fromkeys(c["case"] for c in cases):
        own = [c for c in cases if c["case"] == case]
        within = sum(c["search"]["regret"] <= max(c["dense_noise"], 2 * c["search"]["error"]) for c in own)
        means = {n: [c[n]["regret"] / c["dense_value"] for c in own if n in c] for n in ("search", "grid", "parabola")}
        parts = ", ".join(f"{n} {100 * sum(v) / len(v):.1f} %" for n, v in means.items() if v)
        share = max(c["images"] / c["grid_images"] for c in own)
        authors = min(c["authors_images"] / c["images"] for c in own)
        lines.append(
            f"- {case}: {within} of {len(own)} seeds within the noise, for {share:.2f} of the grid's and "
            f"1/{authors:.0f} of the authors' images at most; above the minimum on average: {parts}."
        )
    return "\n".join(lines)


def diagnosis_table() -> str:
    """What `neon diagnose` says of w's sign beside the best w that was measured; made by diagnosis.py."""
    lines = ["Diagnosis on the toy (`python scripts/search/diagnosis.py toy`):", ""]
    lines += ["| model | seed | s, 95 % interval | cosine | says | best w | |", "|---|---|---|---|---|---|---|"]
    for row in json.loads((RESULTS / "diagnose.json").read_text()):
        lines.append(_diagnosed(row, [str(row["seed"])], [row["best_w"]]))
    lines += [
        "",
        "Diagnosis on real models (`python scripts/search/diagnosis.py small`; best w: of every synthetic set):",
        "",
    ]
    lines += ["| model | images | s, 95 % interval | cosine | says | best w | |", "|---|---|---|---|---|---|---|"]
    for row in json.loads((RESULTS / "diagnose_small.json").read_text()):
        lines.append(_diagnosed(row, [f"{row['images']:,}"], measured_ws(row["case"])))
    return "\n".join([*lines, "", loss_table()])


def loss_table() -> str:
    """The held-out loss of the demo along w; made by diagnosis.py."""
    found = json.loads((RESULTS / "diagnose_loss.json").read_text())
    ws, changes = zip(*((f"{r['w']:g}", f"{r['change']:+.2f} +- {r['error']:.2f}") for r in found["rows"]), strict=True)
    lines = [
        f"The demo's loss on {found['images']:,} held-out real images at w, less that of the base "
        f"({found['base_loss']:.1f}), with the same draws (`python scripts/search/diagnosis.py loss`):",
        "",
        f"| w | {' | '.join(ws)} |",
        "|---" * (1 + len(ws)) + "|",
        f"| | {' | '.join(changes)} |",
    ]
    return "\n".join(lines)


def _diagnosed(row: dict, about: Sequence[str], best_ws: Sequence[float]) -> str:
    low, s, high = row["s"]
    signs = {row["sign"] * math.copysign(1, w) for w in best_ws}
    verdict = "-" if row["sign"] == 0 else {1.0: "right", -1.0: "wrong"}[signs.pop()] if len(signs) == 1 else "mixed"
    cells = [row["case"], *about, f"{s:.3g}, {low:.3g} .. {high:.3g}", f"{row['cosine']:+.2f}"]
    cells += [{1: "w > 0", -1: "w < 0", 0: "undecided"}[row["sign"]], ", ".join(f"{w:.2f}" for w in best_ws), verdict]
    return f"| {' | '.join(cells)} |"


def measured_ws(case: str) -> list[float]:
    """The best w of every synthetic set that results/ has of a small model."""
    if case == "demo":
        return [run["w"] for run in json.loads((ROOT / "results" / "demo.json").read_text())["steps"]["8"]]
    found = json.loads((ROOT / "results" / "small" / f"{case}.json").read_text())
    others = [found[set_]["parabola_w"] for set_ in ("seed1", "seed2") if set_ in found]
    return [found["main"]["w"], *others]


def small_table() -> str:
    """configs/small, one synthetic set each: what the search chose; on two others, what the fixed grid did."""
    lines = [
        "One run of each family on real images (`scripts/evidence/measure.py FAMILY --set select.strategy=search` on "
        "one H200; the grid with 2,000 images at every point on two other synthetic sets):",
        "",
        "| family | images | of the grid's | ended by | chosen | base | Neon | grid's w, two other sets | parabola's "
        "| commit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for job in JOBS:
        found = json.loads((ROOT / "results" / "small" / f"{job}.json").read_text())
        main, others = found["main"], [found[s] for s in ("seed1", "seed2") if s in found]
        select, spent = main["config"]["select"], main["select"]["images"]
        grid = grid_images(select["w"], select["cfg_scale"], select["num_images"])
        at_others = [", ".join(f"{o[key]:.2f}" for o in others) or "-" for key in ("w", "parabola_w")]
        cells = [job, f"{spent:,}", f"1/{grid / spent:.0f}", main["select"]["ended_by"]]
        cells += [_place((main["w"], main["cfg_scale"] or 0.0)), f"{main['base_value']:.4g}"]
        cells += [f"{main['value']:.4g} (gain {_with_error(main['difference'])})", *at_others, found["commit"][:7]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_error(difference: dict) -> str:
    return f"{difference['value']:.3g} +- {difference['error']:.2g}"


STUDIES: dict[str, Callable[[World], list[dict[str, object]]]] = {"toy": lambda _: toy(), "demo": demo, "var": var}


@click.command(help=__doc__)
@click.argument("what", type=click.Choice([*STUDIES, "table"]))
def main(what: str) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    if what == "table":
        cases = [c for name in STUDIES if (f := RESULTS / f"{name}.json").is_file() for c in json.loads(f.read_text())]
        page = ROOT / "docs" / "search.md"
        mark = "<!-- made by scripts/search/study.py table -->"
        head = page.read_text().split(mark)[0]
        parts = [head + mark, summary(cases), table(cases), small_table(), diagnosis_table()]
        page.write_text("\n\n".join(parts) + "\n")
        return
    with world() as ranks:
        cases = STUDIES[what](ranks)
    (RESULTS / f"{what}.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
