"""What can be told from a config, its family and its files before any image is made or any update trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from neon.family import Family
from neon.pipeline.experiment import Experiment
from neon.search.options import Select
from neon.training.step_data import check_groups

Stage = Literal["synth", "finetune", "select", "report"]


def preflight(config: Experiment, family: Family, stages: Sequence[Stage]) -> None:
    """Check the sections of these stages, alone and together.

    Raises ValueError for a section that is absent, guidance that is not named or not searched, and a batch that would
    split images whose loss is computed together.
    """
    missing = [f"[{stage}]" for stage in stages if getattr(config, stage) is None]
    if missing:
        raise ValueError(f"the config has no {' and no '.join(missing)} section, which this command needs")
    for stage in stages:
        if stage != "finetune":
            need_guidance(family, stage, getattr(config, stage).cfg_scale)
    if config.finetune is not None and "finetune" in stages:
        check_groups("finetune", family, config.finetune)
    if config.select is not None and config.report is not None and "report" in stages:
        _check_reported_guidance(config.select, config.report.cfg_scale)


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
