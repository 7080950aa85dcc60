"""The metrics by name, without what computes them: the command line lists them before torch is loaded."""

from __future__ import annotations

from typing import Literal, get_args

Metric = Literal["fid", "fid_inf", "is", "kid", "kid_unbiased", "precision", "recall", "density", "coverage"]
METRICS: tuple[Metric, ...] = get_args(Metric)
