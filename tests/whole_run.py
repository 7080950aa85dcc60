"""What the tests of a family's whole run share: real images to begin with, and what must hold at the end."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fid.features import open_extractor
from fid.moments import Moments
from fid.reference import write_reference
from neon.checkpoints.checkpoint import read
from neon.images.formats import open_images
from tests.commands import ROOT


def write_real_images(folder: Path, count: int) -> None:
    """real.npz, the first images of Fashion-MNIST's test set, and reference.npz, their statistics."""
    with np.load(ROOT / "demo" / "fashion_base.npz") as data:
        np.savez(folder / "real.npz", images=data["images"][:count], labels=data["labels"][:count])
    extractor = open_extractor("fashion-cnn")
    moments = Moments(extractor.dim)
    moments.update(extractor(open_images(folder / "real.npz").read(range(count))).pool)
    write_reference(folder / "reference.npz", moments, {"extractor": extractor.name})


def snapshot(folder: Path) -> dict[str, Tensor]:
    """The fine-tuned weights of the run in `folder`, which keeps one snapshot."""
    (path,) = (folder / "finetune").glob("snapshot-*")
    return dict(read(path, weights="any").tensors)


def assert_finished(folder: Path, result: dict, num_images: int) -> None:
    assert set(result["rows"]) == {"base", "self-trained", "random direction", "neon"}
    assert result["metric"] == f"fd{num_images}[fashion-cnn]"
    assert (folder / "report.html").is_file()


def assert_merged(folder: Path, model: nn.Module, base: Path, w: float) -> dict[str, float]:
    """neon.safetensors is base - w (snapshot - base), buffers as in the base. Returns how far the fine-tune moved every
    tensor."""
    start, end, merged = (
        read(base, weights="any").tensors,
        snapshot(folder),
        read(folder / "neon.safetensors", weights="any").tensors,
    )
    parameters = {name for name, _ in model.named_parameters()}
    assert list(merged) == list(start)
    for name, b in start.items():
        expected = b - w * (end[name] - b) if name in parameters else b
        largest = float(expected[expected.isfinite()].abs().max())  # VAR's and xAR's masks hold -inf
        torch.testing.assert_close(
            merged[name], expected, rtol=0, atol=1e-6 * (largest + 1e-6), msg=lambda text, name=name: f"{name}: {text}"
        )
    return {name: float((end[name] - b).abs().max()) for name, b in start.items() if name in parameters}


def assert_same_run(
    alone: Path, together: Path, results: tuple[dict, dict], *, num_synth: int, constants: Collection[str] = ()
) -> None:
    """One rank's run and two ranks': labels, count and images, the fine-tune up to the order of sums, the final
    distance."""
    assert [result["ranks"] for result in results] == [1, 2]
    one, two = open_images(alone / "synth"), open_images(together / "synth")
    assert len(one) == len(two) == num_synth
    assert one.labels is not None
    assert two.labels is not None
    assert one.labels.tolist() == two.labels.tolist()
    difference = one.read(range(num_synth)).int() - two.read(range(num_synth)).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() <= 1e-4
    ones, twos = snapshot(alone), snapshot(together)
    for name in ones.keys() - constants:
        largest = max(float(ones[name].abs().max()), 0.01)  # what began at zero holds a few small steps alone
        torch.testing.assert_close(
            twos[name], ones[name], rtol=0, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert results[1]["value"] == pytest.approx(results[0]["value"], rel=0.01)
