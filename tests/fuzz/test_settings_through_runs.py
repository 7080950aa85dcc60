"""Settings that a config accepts, through whole runs: a result, or one line. Nothing ends in a traceback."""

from __future__ import annotations

import math
import random
import time
from dataclasses import fields

import pytest

from neon.cli.messages import USER_ERRORS
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.report import page
from neon.runtime.distributed import World
from neon.sampling.options import Sampling, Synth
from neon.search.options import Select
from neon.training.recipe import Training
from tests.fuzz.test_damaged_runs import SMALL

SECONDS = 8.0
VALUES = [
    "0",
    "1",
    "2",
    "7",
    "63",
    "0.5",
    "1.5",
    "1e-3",
    "1e30",
    "true",
    "false",
    '"none"',
    '"drawn"',
    '"codes"',
    "[0.5, 3]",
]
SECTIONS = {"sampling": Sampling, "synth": Synth, "finetune": Training, "select": Select}
LONG = {"images", "num_images", "start_images", "budget_images", "num_repeats"}
"""Keys whose large values only take long."""


def cases() -> list[tuple[str, str]]:
    keys = [
        f"{section}.{f.name}"
        for section, kind in SECTIONS.items()
        for f in fields(kind)
        if f.name not in LONG | {"options", "objective", "sampling", "arch"}
    ]
    keys += ["report.num_shown", "report.labels", "report.cfg_scale", "sampling.spread", "finetune.objective.noise"]
    found = [(key, value) for key in keys for value in VALUES]
    random.Random(0).shuffle(found)
    return found


def test_accepted_settings_end_with_a_result_or_a_line(line_config, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "write_page", lambda *_: None)
    until, finished, messages = time.monotonic() + SECONDS, 0, {}
    for number, (key, value) in enumerate(cases()):
        try:
            config = load(line_config, [*SMALL, f"{key}={value}"])
        except ValueError:
            continue
        try:
            result = Run(config, tmp_path / str(number), World()).all()
        except USER_ERRORS as error:
            messages[key, value] = str(error)
        except BaseException as error:
            pytest.fail(f"{key} = {value}: {type(error).__name__}: {error}")
        else:
            assert math.isfinite(result["value"]), f"{key} = {value}"
            finished += 1
        if time.monotonic() > until:
            break
    assert {case: text for case, text in messages.items() if "\n" in text} == {}
    assert finished > 0
