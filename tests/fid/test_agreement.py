"""Against torch-fidelity and pytorch-fid, where they are installed: pip install -e '.[compare]'. docs/evaluator.md has
the table."""

from __future__ import annotations

import runpy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from neon.images.formats import open_images
from tests.commands import ROOT

pytest.importorskip("torch_fidelity")
pytest.importorskip("pytorch_fid")
COUNT = 24


@pytest.fixture(scope="module")
def compare():
    """The functions of the script that writes the table."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "compare_evaluators.py")))


@pytest.mark.slow
def test_the_same_weights_and_images_give_the_same_numbers(compare, tmp_path):
    images = open_images(ROOT / "demo" / "fashion_base.npz").read(range(2 * COUNT))
    generated = F.avg_pool2d(images[COUNT:].float(), 3, stride=1, padding=1).round().to(torch.uint8)
    rows, taps, reference = compare.compare_features(tmp_path, generated, images[:COUNT])
    assert max(row.difference for row in rows) < 1e-5
    logits = 30 * (taps["logits_unbiased"] - taps["logits_unbiased"].mean(0))
    rows = compare.compare_metrics("here", taps["2048"], reference["2048"], logits, subset=COUNT // 2)
    assert len(rows) == 10
    # they take the root of a singular product (fewer images than features) and multiply the kernel in float32
    assert {row.quantity: row.difference for row in rows if row.difference > 5e-5} == {}
