"""`neon run --synth-seeds N`: the whole of Neon for N synthetic sets, and how far the result depends on the set."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from neon.evaluation.evaluate import spread
from neon.pipeline.experiment import Experiment
from neon.pipeline.run import Run
from neon.runtime.distributed import World
from neon.runtime.progress import say
from neon.sampling.options import Synth
from neon.store import records
from neon.training.recipe import Training


def overrides_of(experiment: Experiment, number: int) -> list[str]:
    """The settings of synthetic set `number`: seeds that follow on, and another order and noise of the fine-tune."""
    synth, recipe = experiment.need("synth", Synth), experiment.need("finetune", Training)
    first = synth.first_seed + number * synth.num_images
    return [f"synth.first_seed={first}", f"finetune.seed={recipe.seed + number}"]


def repeated(experiments: Callable[[int], Experiment], count: int, folder: Path, world: World) -> dict[str, object]:
    """Run every synthetic set in a folder of its own; the base's points are computed once.

    experiments: number -> the config with `overrides_of` that number. Returns, and writes as result.json, the values of
    base and Neon with mean and standard deviation over the sets.
    """
    configs = [experiments(number) for number in range(count)]  # seeds that overlap are said before anything is made
    results: list[dict[str, object]] = []
    for number, experiment in enumerate(configs):
        own = folder / f"synth-seed-{number}"
        if number and world.is_main:
            hand_on_the_base(folder / "synth-seed-0", own)
        world.barrier()
        say(world, f"synthetic set {number + 1} of {count}: {own}")
        results.append(Run(experiment, own, world).all())
        say(world, str(results[-1]["verdict"]))
    found: dict[str, object] = {
        "verdict": verdict_over(results),
        "metric": results[0]["metric"],
        "base_value": results[0]["base_value"],
        "value": spread(values) if (values := values_of(results)) else None,
        "w": [result["w"] for result in results],
        "verdicts": [result["verdict"] for result in results],
        "runs": [str(folder / f"synth-seed-{number}") for number in range(count)],
    }
    if world.is_main:
        records.write_json(found, folder / "result.json")
    world.barrier()
    return found


def values_of(results: Sequence[Mapping[str, object]]) -> list[float]:
    """Neon's values, of the sets that have one."""
    return [value for result in results if isinstance(value := result["value"], float)]


def verdict_over(results: Sequence[Mapping[str, object]]) -> str:
    """One sentence about all synthetic sets."""
    metric, base, values = results[0]["metric"], results[0]["base_value"], values_of(results)
    if not (isinstance(base, float) and values):
        return str(results[0]["verdict"])
    error = spread(values)["std"]
    around = "" if error is None else f" +- {float(str(error)):.2g}"
    mean = sum(values) / len(values)
    lost = "" if len(values) == len(results) else f"; {len(results) - len(values)} gave images that are no numbers"
    return f"over {len(values)} synthetic sets: {metric} {base:.4g} -> {mean:.4g}{around} (mean and spread){lost}"


def hand_on_the_base(first: Path, other: Path) -> None:
    """Give a folder that has no ledger yet the base's lines of the first one, with their pictures and features."""
    ledger = other / "ledger.jsonl"
    if ledger.exists():
        return
    lines = [line for line in records.read_lines(first / "ledger.jsonl") if line["point"]["synth_sha256"] is None]
    keys = {line["key"][:16] for line in lines}
    for kind in ("features", "shown"):
        (other / kind).mkdir(parents=True, exist_ok=True)
        for file in (first / kind).glob("*.npz"):
            if file.stem in keys:
                shutil.copy(file, other / kind / file.name)
    for line in lines:
        records.append_line(ledger, line)
