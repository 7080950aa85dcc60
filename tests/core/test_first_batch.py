"""A family of one's own that returns something else than the contract says is stopped at the first batch, by name."""

import re
from dataclasses import dataclass

import pytest
import torch

from neon import first_batch
from neon.cli.main import main
from tests.commands import invoke
from tests.core.line import Line

SAMPLE, LOSS, DRAW, DECODE = Line.sample, Line.loss, Line.draw, Line.decode


@dataclass(frozen=True)
class Mistake:
    method: str
    does: object
    said: str


MISTAKES = {
    "no tuple": Mistake(
        "sample", lambda *a: SAMPLE(*a)[0], r"line\.sample must return \(codes, labels\).*it returned a tensor \(7, 1"
    ),
    "labels as floats": Mistake(
        "sample", lambda *a: (SAMPLE(*a)[0], SAMPLE(*a)[1].float()), r"the labels are a tensor \(7,\) of float32"
    ),
    "one image too few": Mistake(
        "sample", lambda *a: (SAMPLE(*a)[0][1:], None), r"the codes are a tensor \(6, 1, 4, 4\)"
    ),
    "bytes": Mistake(
        "decode",
        lambda self, codes: ((codes + 1) * 127.5).to(torch.uint8),
        r"line\.decode must return float images \(7, C, H, W\) in \[-1, 1\].* of uint8\. Bytes become",
    ),
    "no channels": Mistake("decode", lambda self, codes: codes[:, 0], r"it returned a tensor \(7, 4, 4\) of float32"),
    "mean over the batch": Mistake(
        "loss",
        lambda *a: LOSS(*a).mean(),
        r"Line\.loss must return the loss of every image, a float tensor \(16,\).*average over all dimensions but the "
        "first",
    ),
    "loss per pixel": Mistake("loss", lambda *a: LOSS(*a)[:, None], r"it returned a tensor \(16, 1\)"),
    "draws of another batch": Mistake(
        "draw", lambda *a: {"noise": torch.zeros(3, 1, 4, 4)}, r"Line\.draw must return .* 'noise' is a tensor \(3, 1"
    ),
    "draws that are a tensor": Mistake("draw", lambda *a: torch.zeros(16), r"must return a dict .* a tensor"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_run_stops_at_the_first_batch_with_what_to_return(line_config, tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(Line, mistake.method, mistake.does)
    done = invoke(main, "run", line_config, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), "one line, no traceback"
    assert re.search(mistake.said, done.stderr), done.stderr
    assert not list((tmp_path / "run").glob("finetune/snapshot-*"))


def test_the_unit_interval_is_told_from_the_right_one():
    images = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert first_batch.lies_in_unit_interval(images)
    assert not first_batch.lies_in_unit_interval(images * 2 - 1)
    assert not first_batch.lies_in_unit_interval(torch.full((8, 3, 4, 4), 0.5)), "one grey says nothing"
