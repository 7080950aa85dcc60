"""The ledger of a run: what each point scored, looked up or computed once, every point on the same noise."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fid.files import UNREADABLE
from neon.evaluation.evaluate import Yardstick, evaluate
from neon.merge import LiveMerge, RandomDirection
from neon.quantize import DivergedError
from neon.runtime.distributed import World
from neon.runtime.progress import Countdown, say
from neon.sampling.generate import Source, generate, to_images
from neon.search.points import Block, Point, Score
from neon.store import files, records

LOG = logging.getLogger(__name__)
ENTRY = ("point", "block", "protocol")
"""The parts of a ledger line that its value depends on."""


def _key(entry: Mapping[str, object]) -> str:
    return records.key_of(records.identity_of(entry))


class Ledger:
    """Evaluates points by moving one resident model. Points already in the ledger cost nothing.

    snapshots: name -> (sha256, function that reads its tensors). protocol: everything besides point and block that
    a value depends on; together they are the ledger's key.
    """

    def __init__(
        self,
        source: Source,
        model: nn.Module,
        base: Mapping[str, Tensor],
        snapshots: Mapping[str, tuple[str, Callable[[], Mapping[str, Tensor]]]],
        yardsticks: Sequence[Yardstick],
        folder: Path,
        protocol: Mapping[str, object],
        world: World,
    ):
        self._source, self._model, self._base, self._snapshots = source, model, base, snapshots
        self._yardsticks, self._folder, self._protocol, self._world = yardsticks, folder, protocol, world
        self._file = folder / "ledger.jsonl"
        self._countdown: Countdown | None = None
        self._live: tuple[tuple[str, str], LiveMerge] | None = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            records.repair_lines(self._file)
        world.barrier()
        lines = records.read_lines(self._file) if world.is_main else []
        # by what a line says, not by its key: keys of earlier versions held the batch and other keys of layout
        self._known: dict[str, dict] = world.broadcast({_key({k: line[k] for k in ENTRY}): line for line in lines})

    def expect(self, count: int) -> None:
        """The next `count` points belong together: after each one that is computed, it is said how long the rest
        takes."""
        self._countdown = Countdown(count)

    def score(self, point: Point, block: Block) -> Score:
        """What `point` scores on `block`: from the ledger, or computed and entered there."""
        entry = self._entry(point, block)
        key = _key(entry)
        known = self._known.get(key)
        if known is None:
            known = self._compute(point, block, key, entry)
        else:
            if block.num_shown and "failed" not in known:
                self._show_again(point, block, known["key"])
            self._count(0.0)
        return self._as_score(point, known)

    def cost_of(self, first_seeds: range) -> tuple[dict[float | None, int], float]:
        """Images at every guidance, and seconds, of everything that was evaluated on blocks that begin with these
        seeds; what was lost and made again counts once."""
        own = [line for line in self._known.values() if line["block"]["first_seed"] in first_seeds]
        images: dict[float | None, int] = {}
        for line in own:
            scale = line["point"]["cfg_scale"]
            images[scale] = images.get(scale, 0) + line["block"]["num_images"]
        return images, sum(line["seconds"].get("total", 0.0) for line in own)

    def tell(self, text: str) -> None:
        """A line for the person who waits, among those of the points."""
        say(self._world, f"  {text}")

    def _count(self, seconds: float) -> None:
        if self._countdown is None:
            return
        text = self._countdown.passed(seconds)
        if seconds:
            self.tell(text)
        if self._countdown.is_over:
            self._countdown = None

    def score_with_features(
        self, point: Point, block: Block, *, make_again: bool = True
    ) -> tuple[Score, Mapping[str, Tensor]]:
        """`score`, and the features (num_images, dim) of every extractor by its name; none if the point failed.

        make_again: whether a known point whose features were not kept is computed again; else it has none.
        """
        key = _key(self._entry(point, block))
        known = self._known.get(key, {})
        if "failed" in known:
            return self.score(point, block), {}
        path = self._folder / "features" / f"{key[:16]}.npz"
        features = self._world.broadcast(self._read_features(path) if self._world.is_main and known else None)
        if features is None and (make_again or not known or known.get("has_features")):
            known = self._compute(point, block, key, self._entry(point, block), features=path)
            features = self._world.broadcast(self._read_features(path) if self._world.is_main else None)
            return self._as_score(point, known), features or {}
        return self.score(point, block), features or {}

    def _read_features(self, path: Path) -> dict[str, Tensor] | None:
        """None: there is no such file, or it is damaged; the features are made again."""
        if not path.is_file():
            return None
        try:
            files.check_zip(path)
            with np.load(path, allow_pickle=False) as data:
                found = {name: torch.from_numpy(data[name]) for name in data.files}
        except UNREADABLE as error:
            LOG.warning("%s: damaged (%s). Its features are made again", path, error)
            return None
        if not found or found.keys() - {y.extractor.name for y in self._yardsticks}:  # no checksum is about names
            LOG.warning("%s: damaged (its table of contents). Its features are made again", path)
            return None
        return found

    def _as_score(self, point: Point, known: Mapping[str, Any]) -> Score:
        made_with = known.get("made_with", dict.fromkeys(records.made_with(self._world)))
        return Score(point, known["metrics"], known["seconds"], known["key"], made_with, known.get("failed"))

    def shown(self, score: Score, count: int) -> Tensor | None:
        """The first `count` images of a score, uint8 (n, C, H, W), if its block kept any and they are pictures."""
        images = self._pictures(score.key)
        if images is None or not count or images.dtype != torch.uint8 or images.ndim != 4:
            return None
        return images[:count]

    def _pictures(self, key: str) -> Tensor | None:
        path = self._folder / "shown" / f"{key[:16]}.npz"
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as data:
                return torch.from_numpy(data["images"])
        except UNREADABLE as error:
            LOG.warning("%s: damaged (%s). Its pictures are made again", path, error)
            return None

    def _show_again(self, point: Point, block: Block, key: str) -> None:
        """Make the pictures of a known point if they are damaged, gone or too few; no value depends on them."""
        world = self._world
        found = self._pictures(key) if world.is_main else None
        if world.broadcast(found is not None and len(found) >= block.num_shown):
            return
        self._move_to(point)
        source = self._source_of(point, block)
        mine: dict[int, Tensor] = {}
        batches = world.batches(block.num_shown, source.sampling.batch)
        for batch in generate(source, self._model, batches, world.device):
            mine |= zip(batch.indices, to_images(source, batch.codes).cpu(), strict=True)
        images = {i: image for part in world.gather(mine) for i, image in part.items()}
        if world.is_main:
            self._keep(torch.stack([images[i] for i in range(block.num_shown)]), key)
        world.barrier()

    def _source_of(self, point: Point, block: Block) -> Source:
        return replace(
            self._source,
            labels=block.labels,
            first_seed=block.first_seed,
            first_label=block.first_label,
            cfg_scale=point.cfg_scale,
        )

    def _entry(self, point: Point, block: Block) -> dict[str, object]:
        moved = point.w != 0  # w = 0 is the base whatever the snapshot: computed once
        weights = {
            "w": point.w,
            "direction": point.direction if moved else "none",
            "synth_sha256": self._snapshots[point.snapshot][0] if moved else None,
        }
        images = {
            "labels": block.labels,
            "first_seed": block.first_seed,
            "num_images": block.num_images,
            "num_shown": block.num_shown,
        } | ({"first_label": block.first_label} if block.first_label else {})
        return {"point": {**weights, "cfg_scale": point.cfg_scale}, "block": images, "protocol": dict(self._protocol)}

    def _compute(
        self, point: Point, block: Block, key: str, entry: Mapping[str, object], features: Path | None = None
    ) -> dict:
        """Evaluate a point and enter it into the ledger. features: the file that keeps those of every image."""
        started = time.monotonic()
        try:
            line = {"key": key, **entry, **self._evaluated(point, block, key, features)}
        except DivergedError as error:
            line = {"key": key, **entry, "metrics": {}, "seconds": {}, "failed": str(error)}
        line["made_with"] = records.made_with(self._world)
        if self._world.is_main:
            records.append_line(self._file, line)
        self._world.barrier()
        self._known[key] = line
        values = ", ".join(f"{name} {value:.4g}" for name, value in line["metrics"].items())
        took = f"({line['seconds']['total']:.0f} s)" if line["seconds"] else ""
        say(self._world, f"  {point.label():<32} {values or line['failed']}   {took}")
        self._count(time.monotonic() - started)
        return line

    def _evaluated(self, point: Point, block: Block, key: str, features: Path | None) -> dict:
        self._move_to(point)
        source = self._source_of(point, block)
        kept = "-features" if features else ""
        found = evaluate(
            source,
            self._model,
            block.num_images,
            [replace(y, keep_features=True) for y in self._yardsticks] if features else self._yardsticks,
            self._world,
            num_shown=block.num_shown,
            partial=self._folder / f"partial-{key[:16]}-{source.sampling.batch}-{block.num_shown}{kept}",
            desc=point.label(),
        )
        if self._world.is_main:
            if found.shown is not None:
                self._keep(found.shown, key)
            if features is not None:
                features.parent.mkdir(exist_ok=True)
                with files.replacing(features) as stream:
                    kept_rows: dict[str, Any] = {name: rows.cpu().numpy() for name, rows in found.features.items()}
                    np.savez(stream, **kept_rows)
        return {"metrics": found.metrics, "seconds": found.seconds, "has_features": features is not None}

    def _keep(self, images: Tensor, key: str) -> None:
        folder = self._folder / "shown"
        folder.mkdir(exist_ok=True)
        with files.replacing(folder / f"{key[:16]}.npz") as stream:
            np.savez_compressed(stream, images=images.numpy())

    def _move_to(self, point: Point) -> None:
        wanted = (point.snapshot, point.direction)
        if self._live is None or self._live[0] != wanted:
            self._live = None  # free the old difference first
            synth = self._snapshots[point.snapshot][1]()
            if point.direction == "random":
                names = [name for name, _ in self._model.named_parameters()]
                synth = RandomDirection(self._base, synth, names, seed=0)
            self._live = (wanted, LiveMerge(self._model, self._base, synth))
        self._live[1].set_w(point.w)
