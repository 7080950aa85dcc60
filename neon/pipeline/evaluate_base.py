"""`neon eval`: one model under the config's [report] protocol."""

from __future__ import annotations

from dataclasses import replace

from neon.config_table import to_plain
from neon.evaluation.evaluate import evaluate, spread, why_not_comparable
from neon.evaluation.options import Report
from neon.pipeline.experiment import check_seeds
from neon.pipeline.preflight import need_guidance
from neon.pipeline.run import Run
from neon.store import records


def evaluate_base(run: Run, repeats: int) -> dict[str, object]:
    """`neon eval`: the model named by [base] under the [report] protocol, on `repeats` disjoint blocks of seeds."""
    config = run.config.need("report", Report)
    if config.cfg_scale == "selected":
        raise ValueError(
            "report.cfg_scale = 'selected' means nothing without a search; give a number with --set "
            "report.cfg_scale=..."
        )
    check_seeds(replace(run.config, report=replace(config, num_images=repeats * config.num_images)))
    run.base  # noqa: B018 - a family of many kinds of models learns from it whether this one is guided
    need_guidance(run.family, "report", config.cfg_scale)
    metric = run.yardsticks[0].headline(config.num_images)
    evaluations = []
    for repeat in range(repeats):
        first_seed = config.first_seed + repeat * config.num_images
        depends_on = [run.identity, [y.identity for y in run.yardsticks], to_plain(config), first_seed]
        partial = run.folder / f"partial-eval-{records.key_of(depends_on)[:16]}"
        source = run.source(config.labels, first_seed, config.cfg_scale)
        evaluations.append(evaluate(source, run.model, config.num_images, run.yardsticks, run.world, partial=partial))
    reason = why_not_comparable(run.yardsticks[0], config.num_images)
    return {
        "metric": metric,
        "value": min(found.metrics[metric] for found in evaluations),
        "comparable": reason is None,
        "reason": reason,
        "metrics": [found.metrics for found in evaluations],
        "repeats": spread([found.metrics[metric] for found in evaluations]),
        "seconds": [found.seconds for found in evaluations],
        "checkpoint": {"path": str(run.base.path), "weights": run.base.weights, "sha256": run.base.sha256},
        "config": to_plain(run.config),
    }
