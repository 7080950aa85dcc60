"""Measure what Neon does for one trained base model of configs/small, with controls, and write it all as one JSON file.

\b
    python scripts/evidence/measure.py edm --folder runs/small --out results/small
    python scripts/evidence/measure.py edm --base-only ...      # the base: samplers, classes recognised, a picture

The same code on GPU and CPU. What is most important comes first; after every measurement the file is written, and when
--seconds are over the rest is listed as not measured. A killed measurement goes on where it stopped.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import click
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fid.frechet import frechet_distance  # noqa: E402
from fid.moments import Moments  # noqa: E402
from neon import merge  # noqa: E402
from neon.checkpoints import checkpoint  # noqa: E402
from neon.evaluation.evaluate import Yardstick, evaluate  # noqa: E402
from neon.images.formats import open_images  # noqa: E402
from neon.pipeline.experiment import load  # noqa: E402
from neon.pipeline.run import Run  # noqa: E402
from neon.report.figures import tile  # noqa: E402
from neon.runtime.distributed import World, world  # noqa: E402
from neon.sampling.generate import generate, to_images  # noqa: E402
from neon.sampling.options import Synth  # noqa: E402
from neon.search.points import Block, Point, Score, best, parabola_minimum  # noqa: E402
from neon.store import files, records, shards  # noqa: E402
from neon.store.filling import Made, Plan, fill  # noqa: E402
from scripts.evidence.jobs import JOBS, Job, base_overrides  # noqa: E402

K = 5
SHARD_IMAGES = 1024
CURVE = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
SAMPLERS: dict[str, dict[str, tuple[str, ...]]] = {
    "edm": {f"{n} steps": (f"sampling.num_steps={n}",) for n in (8, 18, 40)},
    "flow": {f"{n} steps": (f"sampling.num_steps={n}",) for n in (10, 25, 50)},
    "var": {
        "top_p 0.8": ("sampling.top_p=0.8",),
        "top_p 0.95": ("sampling.top_p=0.95",),
        "full distribution": ("sampling.top_p=0.0",),
        "temperature 1.15": ("sampling.top_p=0.0", "sampling.temperature=1.15"),
    },
    "xar": {
        "ode 8": ("sampling.num_steps=8",),
        "ode 16": ("sampling.num_steps=16",),
        "sde 16": ("sampling.solver=sde", "sampling.num_steps=16"),
    },
    "imm": {f"{n} steps": (f"sampling.num_steps={n}",) for n in (2, 4, 8)},
}
"""The samplers of each family; each is scored with the base, those of AXIS with S, fine-tune and w of their own."""
BEST_SAMPLER = ("xar", "imm")
"""Families that are measured with the sampler in which their base is best; the others with their config's."""
AXIS = {"edm": ("8 steps", "40 steps"), "var": ("top_p 0.8", "full distribution", "temperature 1.15")}


class Measured(Run):
    """A run whose first extractor also gives precision and recall, and whose S may be other images than its own."""

    def __init__(self, *arguments: object, images: Corpus | None = None):
        super().__init__(*arguments)
        self._images = images

    @cached_property
    def yardsticks(self) -> list[Yardstick]:
        first, *others = super().yardsticks
        data = self.config.data
        reference = open_images(ROOT / "data" / "fashion_reference.npz", pad=0 if data is None else data.pad)
        features = torch.cat([first.extractor(images).pool.cpu() for images in reference.batches(1000)])
        first = replace(first, metrics=("fid", "precision", "recall"), reference_features=features, k=K)
        return [first, *others]

    def synth(self) -> shards.Shards:
        if self._images is None:
            return super().synth()
        images, config = self._images, self.config.need("synth", Synth)
        self.model  # noqa: B018 - opens the autoencoder, which the fine-tune encodes with
        folder = self.folder / "synth"
        records.claim_folder(folder, images.manifest, self.world)

        def make(batches: Sequence[Sequence[int]]) -> Iterator[Made]:
            for indices in batches:
                yield (indices, *images.read(indices))

        plan = Plan(
            folder=folder, num_images=config.num_images, shard_images=SHARD_IMAGES, batch=SHARD_IMAGES, damaged="refuse"
        )
        return fill(plan, make, self.world, "copy")


class Corpus:
    """Images that stand in for S, and what the manifest says about them."""

    def __init__(self, path: Path, num_images: int, pad: int = 0):
        self._images = open_images(path, pad=pad)
        if len(self._images) < num_images:
            raise ValueError(f"{path}: {len(self._images)} images, {num_images} are needed")
        sha256 = files.sha256_of(path) if path.is_file() else records.key_of(records.read_manifest(path))
        self.manifest = {
            "store": "images",
            "images": path.name,
            "sha256": sha256,
            "num_images": num_images,
            "pad": pad,
            "shard_images": SHARD_IMAGES,
        }

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        labels = self._images.labels
        return self._images.read(indices), None if labels is None else labels[torch.as_tensor(list(indices))]


class Measurement:
    """Everything about one job, written to OUT/JOB.json as it comes."""

    def __init__(
        self, job: Job, models: Path, folder: Path, out: Path, ranks: World, deadline: float, extra: Sequence[str]
    ):
        self.job, self.models, self.folder, self.ranks, self.deadline, self.extra = (
            job,
            models,
            folder,
            ranks,
            deadline,
            tuple(extra),
        )
        self.path = out / f"{job.name}.json"
        out.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, object] = {}
        self.seconds: dict[str, float] = {}
        self.sampler: tuple[str, ...] = ()
        sha256 = self.run("base").identity["base_sha256"]
        if self.path.is_file() and (known := records.read_json(self.path)).get("base_sha256") == sha256:
            self.found, self.seconds = known, known["seconds"]
        self.found |= {"job": job.name, "base_sha256": sha256, "not_measured": []}

    def run(self, name: str, *overrides: str, images: Corpus | None = None) -> Measured:
        config = load(self.job.config, [*base_overrides(self.models, self.job), *self.sampler, *self.extra, *overrides])
        return Measured(config, self.folder / self.job.name / name, self.ranks, images=images)

    def measure(self, name: str, work: Callable[[], object]) -> None:
        """One measurement, unless an earlier run made it; a failure is written down and does not stop the others."""
        known = self.found.get(name)
        if known is not None and not (isinstance(known, dict) and "error" in known):
            return
        if time.time() > self.deadline:
            self.found["not_measured"].append(name)
            return self.write()
        begun = time.time()
        try:
            self.found[name] = work()
        except Exception as error:
            self.found[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"[{self.job.name}] {name} FAILED: {self.found[name]}", file=sys.stderr, flush=True)
        self.seconds[name] = time.time() - begun
        print(f"[{self.job.name}] {name}: {self.seconds[name]:.1f} s", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        device = (
            torch.cuda.get_device_name()
            if self.ranks.device.type == "cuda"
            else platform.processor() or platform.machine()
        )
        about = {
            "device": device,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "seconds": self.seconds,
        }
        records.write_json({**self.found, **about}, self.path)

    # --- the base ---

    def base(self) -> dict[str, object]:
        """Every sampler and guidance on as many images as the search sees; the classes recognised at the best."""
        rows: list[dict] = []
        for name, overrides in SAMPLERS[self.job.family].items():
            run = self.run("base", *overrides)
            for cfg_scale in _scales(run):
                rows.append({"sampler": name, "cfg_scale": cfg_scale, **score_base(run, cfg_scale)})
        chosen = min(rows, key=lambda row: next(iter(row["metrics"].values())))
        run = self.run("base", *SAMPLERS[self.job.family][chosen["sampler"]])
        shown, recognised = pictures_and_classes(run, chosen["cfg_scale"])
        write_picture(self.path.with_name(f"{self.job.name}_base.png"), shown)
        return {
            "rows": rows,
            "best": chosen,
            "recognised": recognised,
            "precision": run.sampling.arithmetic,
            "real_against_real": real_against_real(run),
            "hashes": hashes(run),
        }

    # --- Neon ---

    def main_run(self) -> dict[str, object]:
        return self.run("main").all()

    def other_seed(self, seed: int, size: int | None = None) -> dict[str, object]:
        """Another S: the curve over w at the main run's guidance, then Neon on the held-out noise."""
        overrides = [f"synth.first_seed={20_000 * seed}", f"finetune.seed={seed}"]
        overrides += [] if size is None else [f"synth.num_images={size}"]
        return self.searched(self.run(f"seed{seed}" + ("" if size is None else f"-{size}"), *overrides))

    def real_data(self) -> dict[str, object]:
        """The same fine-tune on real training images, extrapolated in the same way."""
        run = self.run("real")
        data, synth = run.config.data, run.config.need("synth", Synth)
        assert data is not None
        images = Corpus(ROOT / data.path, synth.num_images, data.pad)
        return self.searched(self.run("real", images=images))

    def other_model(self, source: str) -> dict[str, object]:
        """S of another family's main run."""
        folder = self.folder / source / "main" / "synth"
        size = self.run("x").config.need("synth", Synth).num_images
        until = time.time() + 60
        while time.time() < until and not (folder.parent / "finetune").is_dir():
            time.sleep(1)
        return self.searched(self.run(f"of-{source}", images=Corpus(folder, size)))

    def searched(self, run: Measured) -> dict[str, object]:
        """The curve over w at the main run's guidance, and the held-out rows of base, self-trained and the best w."""
        snapshot = run.finetune()[-1].stem.removeprefix("snapshot-")
        main = self.found.get("main", {})
        cfg_scale = main.get("cfg_scale")
        select, report = blocks(run)
        scores = [run.ledger.score(Point(w=w, snapshot=snapshot, cfg_scale=cfg_scale), select) for w in CURVE]
        metric = next(iter(scores[0].metrics))
        winner = best(scores, metric)
        rows = {"self-trained": -1.0, "neon": winner.point.w}
        held_out = {
            name: run.ledger.score(Point(w=w, snapshot=snapshot, cfg_scale=cfg_scale), report)
            for name, w in rows.items()
        }
        return {
            "w": winner.point.w,
            "parabola_w": parabola_minimum(scores, metric),
            "cfg_scale": cfg_scale,
            "curve": [plain(score) for score in scores],
            "rows": {name: plain(score) for name, score in held_out.items()},
            "step": step(run, snapshot),
            "synth_sha256": records.key_of(records.read_manifest(run.folder / "synth")),
        }

    def snapshots_and_w(self) -> list[dict[str, object]]:
        """The main run's earlier snapshots: how the best w falls with the length of the fine-tune."""
        run = self.run("main")
        cfg_scale = self.found["main"]["cfg_scale"]
        select, _ = blocks(run)
        found = []
        for path in run.finetune():
            snapshot = path.stem.removeprefix("snapshot-")
            scores = [
                run.ledger.score(Point(w=w, snapshot=snapshot, cfg_scale=cfg_scale), select) for w in (*CURVE[2:], 4.0)
            ]
            metric = next(iter(scores[0].metrics))
            curve = [plain(score) for score in scores]
            found.append(
                {
                    "images": int(snapshot),
                    "parabola_w": parabola_minimum(scores, metric),
                    "curve": curve,
                    "step": step(run, snapshot),
                }
            )
        return found

    def axis(self, name: str) -> dict[str, object]:
        """Another sampler, with S, fine-tune and w of its own; the base's row is among the curve (w = 0)."""
        return self.searched(self.run(name.replace(" ", "-"), *SAMPLERS[self.job.family][name]))

    def recognised(self) -> dict[str, object]:
        """Share of images that the classifier puts into the class that was asked for: base and Neon."""
        main = self.found["main"]
        run = self.run("main")
        cfg_scale = main["cfg_scale"]
        base, share = pictures_and_classes(run, cfg_scale)
        snapshot = run.finetune()[-1]
        synth = tensors_of(snapshot)
        live = merge.LiveMerge(run.model, run.base_tensors, synth)
        live.set_w(main["w"])
        neon, neon_share = pictures_and_classes(run, cfg_scale)
        write_picture(self.path.with_name(f"{self.job.name}_base_and_neon.png"), torch.cat([base, neon]))
        return {"base": share, "neon": neon_share}

    def everything(self) -> None:
        family = self.job.family
        self.measure("base", self.base)
        if family in BEST_SAMPLER:
            self.sampler = SAMPLERS[family][self.found["base"]["best"]["sampler"]]
        self.found["sampler"] = list(self.sampler)
        self.measure("main", self.main_run)
        self.measure("recognised", self.recognised)
        for seed in (1, 2):
            self.measure(f"seed{seed}", lambda seed=seed: self.other_seed(seed))
        if self.job.is_repeat:
            return
        self.measure("real_data", self.real_data)
        self.measure("synth_1000", lambda: self.other_seed(0, 1_000))
        first, *others = AXIS.get(family, ("",))
        if first:
            self.measure(f"sampler {first}", lambda: self.axis(first))
        if family == "edm":
            self.measure("synth_of_flow", lambda: self.other_model("flow"))
        for name in others:
            self.measure(f"sampler {name}", lambda name=name: self.axis(name))
        self.measure("snapshots", self.snapshots_and_w)


def blocks(run: Run) -> tuple[Block, Block]:
    """Selection and held-out blocks of a run's config."""
    select, report = run.config.select, run.config.report
    assert select is not None
    assert report is not None
    return (
        Block(labels=select.labels, first_seed=select.first_seed, num_images=select.num_images),
        Block(labels=report.labels, first_seed=report.first_seed, num_images=report.num_images),
    )


def plain(score: Score) -> dict[str, object]:
    return {
        "w": score.point.w,
        "cfg_scale": score.point.cfg_scale,
        "metrics": score.metrics,
        "seconds": score.seconds["total"],
    }


def step(run: Run, snapshot: str) -> dict[str, float]:
    synth = tensors_of(run.folder / "finetune" / f"snapshot-{snapshot}.safetensors")
    return merge.step_size(run.base_tensors, synth, 1.0, [name for name, _ in run.model.named_parameters()])


def tensors_of(path: Path) -> dict[str, Tensor]:
    return dict(checkpoint.read(path, weights="any").tensors)


def hashes(run: Run) -> dict[str, object]:
    references = {
        y.extractor.name: {"extractor": y.extractor.sha256, "reference": y.reference.sha256} for y in run.yardsticks
    }
    return {**{key: value for key, value in run.identity.items() if key.endswith("sha256")}, "references": references}


def _scales(run: Run) -> tuple[float | None, ...]:
    select = run.config.select
    return (None,) if select is None or select.cfg_scale is None else select.cfg_scale


def num_selected(run: Run) -> int:
    assert run.config.select is not None
    return run.config.select.num_images


def score_base(run: Measured, cfg_scale: float | None) -> dict[str, object]:
    found = evaluate(
        run.source("balanced", 5_000_000, cfg_scale), run.model, num_selected(run), run.yardsticks, run.world
    )
    return {"metrics": found.metrics, "seconds": found.seconds["total"]}


def real_against_real(run: Measured) -> dict[str, float]:
    """The distance of 2,000 and 5,000 real images that nothing was trained on to the reference: the floor."""
    data = run.config.data
    images = open_images(ROOT / "data" / "fashion_test.npz", pad=0 if data is None else data.pad)
    found = {}
    for yardstick in run.yardsticks:
        for n in (2_000, 5_000):
            moments = Moments(yardstick.extractor.dim)
            moments.update(yardstick.extractor(images.read(range(n))).pool)
            name = f"fd{n // 1000}k[{yardstick.extractor.name}]"
            found[name] = frechet_distance(generated=moments.gaussian(), reference=yardstick.reference)
    return found


def pictures_and_classes(run: Measured, cfg_scale: float | None, num_shown: int = 100) -> tuple[Tensor, float]:
    """(first images, share of all that the classifier recognises as the class that was asked for)."""
    source = run.source("balanced", 5_000_000, cfg_scale)
    num_images = num_selected(run)
    batches = run.world.batches(num_images, run.sampling.batch)
    right, shown = 0, []
    for batch in generate(source, run.model, batches, run.world.device):
        images = to_images(source, batch.codes)
        logits = run.yardsticks[0].extractor(images).logits
        assert logits is not None
        assert batch.labels is not None
        right += int((logits.argmax(1).cpu() == batch.labels.cpu()).sum())
        shown.append(images[: max(num_shown - len(batch.indices) * len(shown), 0)].cpu())
    return torch.cat(shown)[:num_shown], right / num_images


def write_picture(path: Path, images: Tensor) -> None:
    Image.fromarray(tile(images, columns=20)).save(path)


@click.command(help=__doc__)
@click.argument("job", type=click.Choice(list(JOBS)))
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    default=ROOT / "demo" / "small",
    help="JOB/model.safetensors lies there.",
)
@click.option(
    "--folder", type=click.Path(path_type=Path), default=ROOT / "runs" / "small-neon", help="Folder of the runs."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=ROOT / "results" / "small",
    help="Folder of the JSON file and pictures.",
)
@click.option("--seconds", type=float, default=24 * 3600.0, help="Begin nothing new after so many seconds.")
@click.option("--set", "extra", multiple=True, help="As for `neon run`.")
@click.option("--base-only", is_flag=True, help="Measure the base and stop.")
def main(
    job: str, models: Path, folder: Path, out: Path, seconds: float, extra: tuple[str, ...], base_only: bool
) -> None:
    with world() as ranks:
        measurement = Measurement(JOBS[job], models, folder, out, ranks, time.time() + seconds, extra)
        if base_only:
            measurement.measure("base", measurement.base)
        else:
            measurement.everything()
    click.echo(json.dumps({"out": str(measurement.path), "not_measured": measurement.found["not_measured"]}))


if __name__ == "__main__":
    main()
