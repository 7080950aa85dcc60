"""`--dry-run`: what a run will do and cost, from the config and a few measured images, and what it still lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from neon.pipeline.experiment import Experiment
from neon.pipeline.measure import Cost, Rates, measure
from neon.pipeline.needs import Missing
from neon.pipeline.probe import Probe
from neon.search.choose import plan_of
from neon.search.options import Select
from neon.search.points import points_to_try

REPORTED = 4
"""Rows of the report: base, self-trained, random direction, Neon."""
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage in numbers; None where nothing could be measured."""

    name: str
    images: int
    network_calls: int | None
    tflop: float | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole run. seconds: on `ranks` devices like the one that was measured."""

    out: Path
    device: str
    ranks: int
    stages: Sequence[Stage]
    seconds: float | None
    memory_bytes: int | None
    """Per device. On a GPU the measured peak, optimiser and moving average; on a CPU without activations."""
    measured_batches: dict[str, int]
    disk_bytes: int | None
    missing: Sequence[Missing]
    unknown: str
    """Why nothing was measured, "" if it was."""


def make_plan(config: Experiment, out: Path, device: torch.device, ranks: int, missing: Sequence[Missing]) -> Plan:
    """Measure on `device` what the files that are there allow, and count."""
    absent = {one.key for one in missing}
    rates, unknown = None, ""
    if "base.autoencoder" in absent or ("base.checkpoint" in absent and config.model is None):
        unknown = "there is no network to measure before these files are there"
    elif config.sampling is None and config.data is None:
        unknown = "the config neither samples nor names [data]"
    else:
        with_features = config.report is not None and not any(
            key.startswith("report.") or "Inception" in key for key in absent
        )
        rates = measure(Probe(config, device), with_features=with_features)
    stages = [stage for stage in _stages(config, rates, ranks) if stage.images]
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    costs = {} if rates is None else {"sampling": rates.sampling, "training": rates.training}
    return Plan(
        out=out,
        device=str(device),
        ranks=ranks,
        stages=stages,
        seconds=sum(known) if known and len(known) == len(stages) else None,
        memory_bytes=None if rates is None else _memory(config, rates),
        measured_batches={name: cost.batch for name, cost in costs.items() if cost is not None},
        disk_bytes=None if rates is None else _disk(config, rates),
        missing=missing,
        unknown=unknown,
    )


def _stages(config: Experiment, rates: Rates | None, ranks: int) -> list[Stage]:
    sampling = training = features = None
    if rates is not None:
        sampling, training, features = rates.sampling, rates.training, rates.features
    synth = 0 if config.synth is None else config.synth.num_images
    seen = 0 if config.finetune is None else config.finetune.images
    selected = reported = 0
    if config.select is not None:
        selected = _selected(config, config.select, rates)
    if config.report is not None:
        reported = REPORTED * config.report.num_images
    evaluated = [sampling, features] if sampling is not None and features is not None else []
    return [
        _stage("synth", synth, [sampling] if sampling else [], ranks),
        _stage("finetune", seen, [training] if training else [], ranks),
        _stage("select", selected, evaluated, ranks),
        _stage("report", reported, evaluated, ranks),
    ]


def _stage(name: str, images: int, costs: Sequence[Cost], ranks: int) -> Stage:
    if not costs:
        return Stage(name=name, images=images, network_calls=None, tflop=None, seconds=None)
    return Stage(
        name=name,
        images=images,
        network_calls=images * (sum(cost.calls for cost in costs) or 1),
        tflop=images * sum(cost.flop for cost in costs) / 1e12,
        seconds=images * sum(cost.seconds for cost in costs) / ranks,
    )


def _selected(config: Experiment, select: Select, rates: Rates | None) -> int:
    """Images of the grid and its random direction; of a search the budget, of which it may need less."""
    count = _num_snapshots(config)
    if select.strategy == "search" and config.report is not None:
        dim, classes = (0, 0) if rates is None else (rates.feature_dim, rates.num_classes)
        return plan_of(select, count, dim, classes, config.report.num_images).budget_images
    shots = [str(i) for i in range(count if select.snapshots == "all" else 1)]
    return (len(points_to_try(shots, select.w, select.cfg_scale)) + 1) * select.num_images


def _num_snapshots(config: Experiment) -> int:
    recipe = config.finetune
    return 1 if recipe is None or recipe.snapshot_images is None else -(-recipe.images // recipe.snapshot_images)


def _memory(config: Experiment, rates: Rates) -> int:
    """Weights, gradients, two moments of Adam and the moving average; on a GPU the measured peak holds the first
    two, and the activations."""
    recipe = config.finetune or config.train
    kept = 0 if recipe is None else (2 + recipe.has_ema) * rates.weights_bytes
    if rates.peak_bytes is not None:
        return rates.peak_bytes + kept
    return kept + rates.weights_bytes * (1 if recipe is None else 2)


def _disk(config: Experiment, rates: Rates) -> int:
    """S and its encoding, the snapshots, the state that resume needs, the merged file."""
    images = 0 if config.synth is None else config.synth.num_images * (rates.image_bytes + rates.encoded_bytes)
    if config.finetune is None:
        return images
    state = 3 + config.finetune.has_ema
    return images + rates.weights_bytes * (_num_snapshots(config) + state + 1)


def text(plan: Plan) -> str:
    """For people."""
    lines = [f"{'':10}{'images':>12}{'network calls':>16}{'TFLOP':>12}{'time':>10}"]
    for stage in plan.stages:
        calls = "?" if stage.network_calls is None else f"{stage.network_calls:,}"
        tflop = "?" if stage.tflop is None else f"{stage.tflop:,.3g}"
        lines.append(f"{stage.name:10}{stage.images:>12,}{calls:>16}{tflop:>12}{_time(stage.seconds):>10}")
    batches = ", ".join(f"{name} {size}" for name, size in plan.measured_batches.items())
    where = f"{plan.ranks} x {plan.device}" if plan.ranks > 1 else plan.device
    lines.append("")
    if plan.unknown:
        lines.append(f"time, memory and disk are not known yet: {plan.unknown}")
    else:
        total = _time(plan.seconds) if plan.seconds is not None else "not known before all files are there,"
        lines.append(f"time    {total} in all on {where}, from measured batches ({batches})")
        what = "per GPU at these batches" if plan.device.startswith("cuda") else "of weights and optimiser"
        lines.append(f"memory  {_size(plan.memory_bytes)} {what}")
        lines.append(f"disk    {_size(plan.disk_bytes)} in {plan.out}")
    if plan.missing:
        lines += ["", "missing:", *(f"  {one}" for one in plan.missing)]
    return "\n".join(lines)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"
