"""The search for w (and cfg_scale): the same noise for every point, a ledger that remembers each, controls always there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from neon import files, records
from neon.distributed import World
from neon.evaluate import Evaluation, Yardstick, evaluate
from neon.generate import Source
from neon.merge import LiveMerge, random_direction
from neon.progress import say


@dataclass(frozen=True, kw_only=True)
class Point:
    """One set of weights and one guidance: base - w (direction - base), direction = a snapshot or random of its norm."""

    w: float
    snapshot: str
    cfg_scale: float | None = None
    direction: Literal["synth", "random"] = "synth"

    def label(self) -> str:
        parts = [f"w = {self.w:g}"]
        if self.cfg_scale is not None:
            parts.append(f"cfg {self.cfg_scale:g}")
        if self.direction == "random":
            parts.append("random direction")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Block:
    """The images that a point is judged by."""

    labels: Literal["balanced", "drawn"]
    first_seed: int
    num_images: int
    num_shown: int = 0


@dataclass(frozen=True)
class Score:
    """A point with what it scored on a block. key: its name in the ledger and of its picture file."""

    point: Point
    metrics: dict[str, float]
    seconds: dict[str, float]
    key: str


class Grid:
    """Evaluates points by moving one resident model. Points already in the ledger cost nothing.

    snapshots: name -> (sha256, function that reads its tensors). protocol: everything besides point and block that a value
    depends on; together they are the ledger's key.
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
        self._ledger = folder / "ledger.jsonl"
        self._live: tuple[tuple[str, str], LiveMerge] | None = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            records.repair_lines(self._ledger)
        world.barrier()
        self._known: dict[str, dict] = world.broadcast({line["key"]: line for line in records.read_lines(self._ledger)})

    def score(self, point: Point, block: Block) -> Score:
        """What `point` scores on `block`: from the ledger, or computed and entered there."""
        entry = self._entry(point, block)
        key = records.key_of(entry)
        known = self._known.get(key)
        if known is None:
            known = self._compute(point, block, key, entry)
        return Score(point, known["metrics"], known["seconds"], key)

    def shown(self, score: Score) -> Tensor | None:
        """The first images of a score, uint8 (n, C, H, W), if its block kept any."""
        path = self._folder / "shown" / f"{score.key[:16]}.npz"
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as data:
            return torch.from_numpy(data["images"])

    def _entry(self, point: Point, block: Block) -> dict[str, object]:
        moved = point.w != 0  # w = 0 is the base whatever the snapshot: computed once
        weights = {
            "w": point.w,
            "direction": point.direction if moved else "none",
            "synth_sha256": self._snapshots[point.snapshot][0] if moved else None,
        }
        images = {"labels": block.labels, "first_seed": block.first_seed, "num_images": block.num_images, "num_shown": block.num_shown}
        return {"point": {**weights, "cfg_scale": point.cfg_scale}, "block": images, "protocol": dict(self._protocol)}

    def _compute(self, point: Point, block: Block, key: str, entry: Mapping[str, object]) -> dict:
        self._move_to(point)
        source = replace(self._source, labels=block.labels, first_seed=block.first_seed, cfg_scale=point.cfg_scale)
        found = evaluate(
            source,
            self._model,
            block.num_images,
            self._yardsticks,
            self._world,
            num_shown=block.num_shown,
            partial=self._folder / f"partial-{key[:16]}",
            desc=point.label(),
        )
        line = {"key": key, **entry, "metrics": found.metrics, "seconds": found.seconds}
        if self._world.is_main:
            self._keep(found, key)
            records.append_line(self._ledger, line)
        self._world.barrier()
        self._known[key] = line
        values = ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
        say(self._world, f"  {point.label():<32} {values}   ({found.seconds['total']:.0f} s)")
        return line

    def _keep(self, found: Evaluation, key: str) -> None:
        if found.shown is None:
            return
        folder = self._folder / "shown"
        folder.mkdir(exist_ok=True)
        with files.replacing(folder / f"{key[:16]}.npz") as stream:
            np.savez_compressed(stream, images=found.shown.numpy())

    def _move_to(self, point: Point) -> None:
        wanted = (point.snapshot, point.direction)
        if self._live is None or self._live[0] != wanted:
            self._live = None  # free the old difference first
            synth = self._snapshots[point.snapshot][1]()
            if point.direction == "random":
                names = [name for name, _ in self._model.named_parameters()]
                synth = random_direction(self._base, synth, names, seed=0)
            self._live = (wanted, LiveMerge(self._model, self._base, synth))
        self._live[1].set_w(point.w)


def points_to_try(snapshots: Sequence[str], w: Sequence[float], cfg_scales: Sequence[float] | None) -> list[Point]:
    """The points to try: every w, with w = 0 and w = -1, for every snapshot and cfg_scale; the base only once per cfg_scale."""
    tried = sorted({0.0, -1.0, *w})
    found = [
        Point(w=value, snapshot=snapshot, cfg_scale=cfg_scale)
        for snapshot in snapshots
        for cfg_scale in (cfg_scales or (None,))
        for value in tried
        if value != 0 or snapshot == snapshots[-1]
    ]
    return sorted(found, key=lambda p: snapshots.index(p.snapshot))


def best(scores: Sequence[Score], metric: str) -> Score:
    """The score with the least distance; the earliest of equal ones."""
    return min(scores, key=lambda s: s.metrics[metric])


def parabola_minimum(scores: Sequence[Score], metric: str) -> float | None:
    """w of the vertex of the parabola through the best point and its two neighbours: the curve is locally quadratic in w
    (paper, App. C). None if the best point is at the border or the three points do not bend upwards."""
    ordered = sorted(scores, key=lambda s: s.point.w)
    i = min(range(len(ordered)), key=lambda k: ordered[k].metrics[metric])
    if i in (0, len(ordered) - 1):
        return None
    w, y = zip(*((s.point.w, s.metrics[metric]) for s in ordered[i - 1 : i + 2]), strict=True)
    curvature, slope, _ = np.polyfit(w, y, 2)
    return float(-slope / (2 * curvature)) if curvature > 0 else None
