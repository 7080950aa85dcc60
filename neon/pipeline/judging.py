"""After the fine-tune: choose a point, report it with its controls on held-out noise, say what that means."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fid.precision_recall import precision_recall
from neon.evaluation.evaluate import Yardstick, why_not_comparable
from neon.evaluation.options import Report
from neon.pipeline.experiment import Data, Experiment
from neon.report.result import Cost, Result, compared, verdict
from neon.runtime.distributed import World
from neon.runtime.progress import say
from neon.sampling.generate import Source, generate
from neon.sampling.options import Sampling, Synth
from neon.search.choose import Choice, by_grid, by_search, random_control
from neon.search.ledger import Ledger
from neon.search.options import Select
from neon.search.points import Block, Score
from neon.seeds import at_random
from neon.store import files, records
from neon.training.recipe import Training

LOG = logging.getLogger(__name__)
MAX_REAL = 5_000
"""Real images that precision and recall are measured against."""
NEIGHBOURS = 5
"""k of precision and recall, as in the paper."""


@dataclass(frozen=True)
class Judge:
    """One run's points, judged by its yardsticks."""

    config: Experiment
    ledger: Ledger
    yardsticks: Sequence[Yardstick]
    num_classes: int
    world: World
    folder: Path

    @property
    def yardstick(self) -> Yardstick:
        """The one that chooses: that of the extractor which select.metric names, or the first."""
        wanted, named = self.config.need("select", Select).metric, list(self.config.need("report", Report).extractors)
        return self.yardsticks[0 if wanted is None else named.index(wanted)]

    def choose(self, steps: Mapping[str, float]) -> Choice:
        """Stage 3. steps: snapshot -> length of its step from the base, in the order of training."""
        config = self.config.need("select", Select)
        last = config.first_seed + config.num_images - 1
        headline = self.yardstick.headline(config.num_images)
        say(self.world, f"select by {config.strategy}: {headline} on seeds {config.first_seed} .. {last}")
        if config.strategy == "grid":
            return by_grid(self.ledger, config, list(steps), self.yardstick, num_classes=self.num_classes)
        images = self.config.need("report", Report).num_images
        return by_search(self.ledger, config, steps, self.yardstick, num_classes=self.num_classes, report_images=images)

    def report(self, choice: Choice) -> tuple[dict[str, Score], dict[str, Mapping[str, Tensor]]]:
        """Stage 4: base, self-trained, random and Neon on held-out noise, and the features of each."""
        config = self.config.need("report", Report)
        block = Block(
            labels=config.labels,
            first_seed=config.first_seed,
            num_images=config.num_images,
            num_shown=min(config.num_shown, config.num_images),
        )
        is_selected = config.cfg_scale == "selected"
        cfg_scale = choice.point.cfg_scale if config.cfg_scale == "selected" else config.cfg_scale
        point = replace(choice.point, cfg_scale=cfg_scale)
        say(self.world, f"report: {config.num_images} images of held-out noise, seeds from {config.first_seed}")
        rows = {
            "base": replace(point, w=0.0, cfg_scale=choice.base_cfg_scale if is_selected else cfg_scale),
            "self-trained": replace(point, w=-1.0),
            "random direction": random_control(point),
            "neon": point,
        }
        if any(y.reference is None for y in self.yardsticks):  # a function of one's own keeps no features
            return {name: self.ledger.score(p, block) for name, p in rows.items()}, {}
        found = {name: self.ledger.score_with_features(p, block, make_again=False) for name, p in rows.items()}
        return {name: score for name, (score, _) in found.items()}, {name: kept for name, (_, kept) in found.items()}

    def result(
        self,
        choice: Choice,
        rows: Mapping[str, Score],
        features: Mapping[str, Mapping[str, Tensor]],
        calls: Calls,
    ) -> Result:
        """Stage 5: the numbers, their errors, the verdict and the cost."""
        config = self.config.need("report", Report)
        metric = self.yardstick.headline(config.num_images)
        values = {name: score.metrics[metric] for name, score in rows.items() if score.failed is None}
        period = self.num_classes if config.labels == "balanced" and self.num_classes else 1
        difference, errors = compared(features, self.yardstick, values, period)
        shown = {name: self.ledger.shown(score, config.num_shown) for name, score in rows.items()}
        return Result(
            metric=metric,
            rows=rows,
            choice=choice,
            difference=difference,
            verdict=verdict(choice, rows, metric, difference),
            not_comparable=why_not_comparable(self.yardstick, config.num_images),
            errors=errors,
            neighbours=self._neighbours(choice, features),
            costs=self._costs(rows, calls),
            pictures={name: images for name, images in shown.items() if images is not None},
            slides=self._slides(choice),
            about={},
        )

    def _slides(self, choice: Choice) -> list[tuple[float, float | None, Tensor]]:
        """The pictures of the chosen snapshot's points, where the search kept any."""
        own = [s for s in choice.scores if s.point.snapshot == choice.point.snapshot or s.point.w == 0]
        found = [(s.point.w, s.point.cfg_scale, self.ledger.shown(s, 36)) for s in own if s.point.direction == "synth"]
        kept = [(w, cfg, images) for w, cfg, images in found if images is not None]
        return sorted(kept, key=lambda slide: (slide[0], slide[1] or 0.0))

    def _neighbours(self, choice: Choice, features: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, float]]:
        """Precision and recall of the rows and along the curve, against the images of [data]; none without them, and
        none of sets that are too small."""
        name = self.yardstick.extractor.name
        sets = {row: kept[name] for row, kept in features.items() if name in kept}
        for point, rows in choice.features.items():
            is_own = point.snapshot == choice.point.snapshot or point.w == 0
            label = point.label() if is_own else f"{point.label()}, after {int(point.snapshot):,} images"
            sets[label] = rows
        sets = {label: rows for label, rows in sets.items() if len(rows) > NEIGHBOURS}
        if self.config.data is None or not sets:
            return {}
        try:
            real = self._real_features(self.config.data)
        except FileNotFoundError:  # the run itself needs no real images
            return {}
        except (ValueError, OSError) as error:
            LOG.warning("precision and recall are left out: %s", error)
            return {}
        if len(real) <= NEIGHBOURS:
            return {}
        found = {}
        for label, rows in sets.items():
            metrics = precision_recall(
                generated=rows, reference=real, k=NEIGHBOURS, device=self.yardstick.extractor.device
            )
            found[label] = {"precision": metrics.precision, "recall": metrics.recall}
        return found

    def _real_features(self, data: Data) -> Tensor:
        images = data.open(use_labels=False)
        some = images.subset(at_random(len(images), MAX_REAL, seed=0).tolist())
        return torch.cat([self.yardstick.extractor(part).pool.cpu() for part in some.batches(256)])

    def _costs(self, rows: Mapping[str, Score], calls: Calls) -> list[Cost]:
        """What every stage took. A training image counts as three network passes, a sampled one as its calls."""
        trained = None if self.config.train is None else self.config.train.images
        synth, recipe = self.config.need("synth", Synth), self.config.need("finetune", Training)
        times, looked = read_times(self.folder), cache(calls)  # an image is made to learn it: once per guidance

        def sampled(
            stage: str, images: Mapping[float | None, int], seconds: float | None, sampling: Sampling | None = None
        ) -> Cost:
            made = sum(images.values())
            known = [((looked if sampling is None else calls)(scale, sampling), n) for scale, n in images.items()]
            total = sum((each or 0) * n for each, n in known) if all(each for each, _ in known) else None
            share = None if total is None or trained is None else total / (3 * trained)
            return Cost(stage=stage, images=made, network_calls=total, seconds=seconds, share_of_training=share)

        select = self.config.need("select", Select)
        searched, search_s = self.ledger.cost_of(range(select.first_seed, select.first_seed + select.num_images))
        tuned = Cost(
            stage="fine-tune",
            images=recipe.images,
            network_calls=3 * recipe.images,
            seconds=times.get("finetune"),
            share_of_training=None if trained is None else recipe.images / trained,
        )
        scales = [score.point.cfg_scale for score in rows.values()]
        num_images = self.config.need("report", Report).num_images
        reported = {scale: num_images * scales.count(scale) for scale in scales}
        return [
            sampled("synthetic set", {synth.cfg_scale: synth.num_images}, times.get("synth"), synth.sampling),
            tuned,
            sampled("search", searched, search_s),
            sampled("report", reported, sum(s.seconds.get("total", 0.0) for s in rows.values())),
        ]


Calls = Callable[[float | None, Sampling | None], int | None]
"""Network calls for one image at a guidance; with other sampling options than the config's."""


def calls_per_image(source: Source, model: nn.Module, device: torch.device) -> int | None:
    """How often the network is called for one image (twice with guidance); None for networks that are not called as
    one module."""
    calls = 0

    def count(module: nn.Module, inputs: tuple[object, ...]) -> None:
        nonlocal calls
        first = next((value for value in inputs if isinstance(value, Tensor) and value.ndim > 1), None)
        calls += 1 if first is None else len(first)

    handle = model.register_forward_pre_hook(count)
    try:
        for _ in generate(replace(source, sampling=replace(source.sampling, speed="exact")), model, [range(1)], device):
            pass
    finally:
        handle.remove()
    return calls or None


@contextmanager
def timed(folder: Path, stage: str, world: World) -> Iterator[None]:
    """Add the block's seconds to what the stage took before in this folder (a killed process adds nothing)."""
    started = time.perf_counter()
    yield
    if world.is_main:
        times = read_times(folder)
        times[stage] = times.get(stage, 0.0) + time.perf_counter() - started
        files.write_text(folder / "seconds.json", json.dumps(times))


def read_times(folder: Path) -> dict[str, float]:
    path = folder / "seconds.json"
    try:
        return records.read_json(path) if path.is_file() else {}
    except records.DamagedError as error:
        LOG.warning("%s. The times of the earlier stages are forgotten", error)
        return {}
