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

    Raises FileNotFoundError for a missing reference or weights, ValueError where a reference is another extractor's.
    """
    found = []
    for name, reference in config.extractors.items():
        weights = Path(config.inception) if config.inception is not None and name == "inception-2015-12-05" else None
        extractor = open_extractor(name, path=weights, device=device)
        statistics = read_reference(hub.local(reference))
        check_made_with(statistics, extractor)
        found.append(Yardstick(extractor=extractor, reference=statistics))
    return found
