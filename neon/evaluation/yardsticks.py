"""The extractors and reference statistics that a config's [report] names, opened and checked against each other."""

from __future__ import annotations

from pathlib import Path

import torch

from fid.features import open_extractor
from fid.reference import check_made_with, read_reference
from neon.evaluation.evaluate import Yardstick
from neon.evaluation.options import Report
from neon.store import hub


def open_yardsticks(config: Report, device: torch.device) -> list[Yardstick]:
    """One yardstick per entry of report.extractors, the headline first.

    Raises FileNotFoundError for a missing reference or weights, ValueError where a reference is another extractor's or
    two entries give extractors of one name.
    """
    found: list[Yardstick] = []
    entries: dict[str, str] = {}
    for name, reference in config.extractors.items():
        weights = Path(config.inception) if config.inception is not None and name == "inception-2015-12-05" else None
        extractor = open_extractor(name, path=weights, device=device)
        statistics = read_reference(hub.local(reference))
        check_made_with(statistics, extractor)
        check_distinct(entries, name, extractor.name)
        found.append(Yardstick(extractor=extractor, reference=statistics))
    return found


def check_distinct(entries: dict[str, str], entry: str, extractor: str) -> None:
    """Note that `entry` gives an extractor of this name. Raises ValueError if another one did: the values of both would
    have one name, and the later ones would take the place of the earlier."""
    if (first := entries.setdefault(extractor, entry)) != entry:
        raise ValueError(
            f"extractors {first!r} and {entry!r} both give one called {extractor!r}, so their values could not be told "
            "apart: name one of them, or give the second extractor another name"
        )
