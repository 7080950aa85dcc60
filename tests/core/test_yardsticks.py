"""Several extractors, and extractors of one's own, whose name is not that of their entry in the config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import neon
from fid.features import Extractor
from neon.evaluation import evaluate, on_disk
from neon.evaluation.compute import compute
from neon.pipeline import evaluate_base
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.runtime.distributed import World
from tests.quarters_extractor import Quarters, write_statistics

PIXELS, QUARTERS = "tests.core.line_family:open_pixels", "tests.quarters_extractor:open_quarters"
AGAIN = "tests.core.test_yardsticks:open_again"


def open_again(*, path: Path | None, device: torch.device | str, allow_unknown_weights: bool) -> Extractor:
    return Quarters(device)


def measured_by(config: Path, *entries: str) -> str:
    """The override of report.extractors with these entries."""
    write_statistics(config.parent / "quarters.npz", size=4)
    files = {PIXELS: "reference.npz"}
    pairs = (f'"{entry}" = "{config.parent / files.get(entry, "quarters.npz")}"' for entry in entries)
    return f"report.extractors={{ {', '.join(pairs)} }}"


def test_the_metric_that_chooses_is_named_as_its_entry(line_config, tmp_path):
    both = measured_by(line_config, PIXELS, QUARTERS)
    found = Run(load(line_config, [both, f'select.metric="{QUARTERS}"']), tmp_path / "both", World()).all()
    alone = Run(load(line_config, [measured_by(line_config, QUARTERS)]), tmp_path / "alone", World()).all()
    assert found["metric"] == alone["metric"] == "fd40[quarters]"
    assert found["select"]["metric"] == "fd30[quarters]"
    assert (found["w"], found["snapshot_images"], found["value"]) == (
        alone["w"],
        alone["snapshot_images"],
        alone["value"],
    )


def test_two_extractors_of_one_name_are_refused(line_config, tmp_path):
    """Their values would have one name, and the later ones would take the place of the earlier."""
    said = f"extractors '{QUARTERS}' and '{AGAIN}' both give one called 'quarters'"
    with pytest.raises(ValueError, match=said):
        Run(load(line_config, [measured_by(line_config, QUARTERS, AGAIN)]), tmp_path / "run", World()).all()
    assert not (tmp_path / "run/synth").exists()
    images = torch.randint(256, (30, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    references = dict.fromkeys((QUARTERS, AGAIN), str(line_config.parent / "quarters.npz"))
    with pytest.raises(ValueError, match=said):
        neon.evaluate(images, references)


class Stopped(Exception):  # noqa: N818 - it is no error
    """In place of a pass over images."""


def test_sums_of_an_extractor_that_was_edited_are_not_gone_on_with(line_config, tmp_path, monkeypatch):
    """The name of the folder of sums changes with the source of an extractor of one's own."""
    folders: list[Path] = []

    def stop(*_: object, partial: Path, **__: object) -> None:
        folders.append(partial)
        raise Stopped

    images = np.zeros((4, 8, 8, 3), np.uint8)
    for source in ("one", "one", "another"):
        monkeypatch.setattr(evaluate, "source_sha256", lambda kind, source=source: source)
        monkeypatch.setattr(on_disk, "source_sha256", lambda kind, source=source: source)
        monkeypatch.setattr(evaluate_base, "evaluate", stop)
        config = load(line_config, [measured_by(line_config, QUARTERS), "report.cfg_scale=1.0"])
        with pytest.raises(Stopped):
            evaluate_base.evaluate_base(Run(config, tmp_path / "eval", World()), 1)
        monkeypatch.setattr(on_disk, "collect", stop)
        with pytest.raises(Stopped):
            compute(images, images, extractor=QUARTERS, resume=tmp_path / "sums")
    of_eval, of_set = folders[::2], folders[1::2]
    assert of_eval[0] == of_eval[1] != of_eval[2]
    assert of_set[0] == of_set[1] != of_set[2]
