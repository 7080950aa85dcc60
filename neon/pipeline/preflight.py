"""What can be told from a config, its family and its files before any image is made or any update trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from neon.family import Family
from neon.pipeline.experiment import Experiment
from neon.search.options import Select
from neon.training.step_data import check_groups

Stage = Literal["synth", "finetune", "select", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""Of `neon run`, in their order."""


def preflight(config: Experiment, family: Family, stages: Sequence[Stage]) -> None:
    """Check the sections of these stages, alone and together.

    Raises ValueError for a section that is absent, guidance that is not named or not searched, and a batch that would
    split images whose loss is computed together.
    """
    _check_sections(config, family, stages)
    check_guidance(config, family, stages)


def _check_sections(config: Experiment, family: Family, stages: Sequence[Stage]) -> None:
    """What needs no model."""
    missing = [f"[{stage}]" for stage in stages if getattr(config, stage) is None]
    if missing:
        raise ValueError(f"the config has no {' and no '.join(missing)} section, which this command needs")
    if config.finetune is not None and "finetune" in stages:
        check_groups("finetune", family, config.finetune)
    if config.select is not None and config.report is not None and "report" in stages:
        _check_reported_guidance(config.select, config.report.cfg_scale)


def check_guidance(config: Experiment, family: Family, stages: Sequence[Stage]) -> None:
    """Raise ValueError as `need_guidance`, and for a scale that the sampler does not take. A family of many kinds of
    models knows whether this one is guided once it has read the base."""
    for stage in stages:
        if stage != "finetune":
            need_guidance(family, stage, getattr(config, stage).cfg_scale)
    for scale, where in scales_of(config, stages).items():
        if config.sampling is not None:
            _check_taken(family, config.sampling.options, scale, where)


def scales_of(config: Experiment, stages: Sequence[Stage]) -> dict[float, str]:
    """Every guidance that these stages sample with, and the key that asks for it first."""
    found: dict[float, str] = {}
    for stage in stages:
        if stage != "finetune":
            scales = getattr(config, stage).cfg_scale
            for scale in scales if isinstance(scales, tuple) else (scales,):
                if isinstance(scale, float):
                    found.setdefault(scale, f"{stage}.cfg_scale")
    return found


def _check_taken(family: Family, options: object, scale: float, where: str) -> None:
    try:
        family.with_guidance(options, scale)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def described(config: Experiment, family: Family) -> str:
    """Which stages the config has and what else `neon run` needs, in a line.

    Raises ValueError if a stage that it has lacks a section, or as `preflight` does for them, guidance aside.
    """
    present = stages_of(config)
    if lacking := [f"[{one}]" for one in _needed_by(present) if getattr(config, one) is None]:
        raise ValueError(f"there is no {' and no '.join(lacking)}, which [{'], ['.join(present)}] need")
    _check_sections(config, family, present)
    absent = [f"[{stage}]" for stage in STAGES if stage not in present]
    updates = [
        f"{name}: {-(-recipe.images // recipe.batch):,} updates of {recipe.batch}"
        for name in ("train", "finetune")
        if (recipe := getattr(config, name)) is not None
    ]
    parts = ["all that `neon run` needs" if not absent else f"`neon run` would also need {', '.join(absent)}", *updates]
    if config.sampling is None:
        parts.append("no [sampling]: nothing that needs images of the model is tried")
    return "; ".join(parts)


def stages_of(config: Experiment) -> list[Stage]:
    """Those that the config has a section for."""
    return [stage for stage in STAGES if getattr(config, stage) is not None]


def _needed_by(stages: Sequence[Stage]) -> list[str]:
    """Sections without which these stages cannot be made."""
    needed = ["base", "sampling"] if stages else []
    return needed + ["synth"] * ("finetune" in stages) + ["report"] * ("select" in stages)


def doubts(config: Experiment) -> list[str]:
    """What can be done as it stands, but is hardly meant."""
    found = []
    for name in ("train", "finetune"):
        recipe = getattr(config, name)
        if recipe is not None and recipe.images < recipe.batch:
            found.append(
                f"{name}.images = {recipe.images} is less than one batch: a single update is made, on {recipe.batch} "
                "images"
            )
    if config.synth is not None and config.finetune is not None and config.finetune.batch > config.synth.num_images:
        found.append(
            f"finetune.batch = {config.finetune.batch} is more than the {config.synth.num_images} images of [synth]: "
            "a batch holds some of them several times"
        )
    return found


def few_images(config: Experiment, extractor: str, dim: int) -> list[str]:
    """Blocks of images that are too small for this entry of report.extractors, which gives `dim` features."""
    report, select = config.report, config.select
    blocks = {} if report is None else {"report": report.num_images}
    if report is not None and select is not None and extractor == (select.metric or next(iter(report.extractors))):
        blocks["select"] = select.num_images
    return [
        f"{section}.num_images = {count} for the {dim} features of {extractor}: their covariance is singular and the "
        f"distance mostly noise; take several times {dim}"
        for section, count in blocks.items()
        if count <= dim
    ]


def need_guidance(family: Family, section: str, cfg_scale: object) -> None:
    """Raise ValueError if a guided family's section leaves its scale open, or if a model without guidance gets one."""
    if not family.is_guided and cfg_scale is not None:
        raise ValueError(f"{section}.cfg_scale: this {family.name} model has no guidance; remove the key")
    if family.is_guided and cfg_scale is None:
        raise ValueError(
            f"{section}.cfg_scale: this family is guided, name the scale (there is no hidden default)"
            + (", or 'selected' for the one that the search finds" if section == "report" else "")
        )


def _check_reported_guidance(select: Select, reported: float | str | None) -> None:
    searched = select.cfg_scale
    if searched is None or not isinstance(reported, float) or reported in searched:
        return
    if select.strategy == "search" and min(searched) <= reported <= max(searched):
        return
    raise ValueError(
        f"report.cfg_scale: no w is searched at {reported}, select.cfg_scale is {list(searched)}. Add it there, or "
        "write report.cfg_scale = 'selected'"
    )
