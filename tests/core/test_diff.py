"""`neon diff` against norms and cosines that torch computes on the whole tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from neon.checkpoints import one_pass
from neon.cli.main import main
from neon.merge_files import difference
from neon.merge_files.pairing import Request


def model(seed: int, step: float = 0.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    names = ["embed.weight", "blocks.0.a.weight", "blocks.0.b.bias", "blocks.1.a.weight", "head.norm.running_mean"]
    held = {name: torch.randn(13, 11, generator=g) for name in names}
    g.manual_seed(seed)
    return {name: value + step * torch.randn(13, 11, generator=g) for name, value in held.items()} | {
        "same.weight": torch.ones(3)
    }


def test_relative_steps_and_cosines_per_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass, "CHUNK", 50)
    monkeypatch.setattr(difference, "CHUNK", 50)
    base, first, last = model(0), model(1, 0.1), model(2, 0.3)
    for name, held in (("base", base), ("first", first), ("last", last)):
        torch.save(held, tmp_path / f"{name}.pth")
    result = CliRunner().invoke(
        main,
        ["diff", *(str(tmp_path / f"{name}.pth") for name in ("base", "first", "last")), "--out", f"{tmp_path}/d.png"],
    )
    assert result.exit_code == 0, result.output
    found = {block["block"]: block for block in json.loads(result.stdout.splitlines()[-1])["blocks"]}
    assert list(found) == ["embed", "blocks.0", "blocks.1", "same", "all"]
    for block in ("embed", "blocks.0", "blocks.1"):
        names = [name for name in base if name.startswith(block)]
        flat = [torch.cat([held[name].flatten() for name in names]).double() for held in (base, first, last)]
        steps = [flat[1] - flat[0], flat[2] - flat[0]]
        expected = [(step.norm() / flat[0].norm()).item() for step in steps]
        assert found[block]["relative_step"] == pytest.approx(expected, rel=1e-5)
        cosine = torch.nn.functional.cosine_similarity(*steps, dim=0).item()
        assert found[block]["cosine_to_last"] == pytest.approx([cosine, 1.0], abs=1e-6)
        assert found[block]["parameters"] == len(flat[0])
    assert found["same"]["relative_step"] == [0, 0]
    assert found["same"]["cosine_to_last"] == [None, None]
    assert "blocks.1" in result.stderr
    assert Image.open(tmp_path / "d.png").size[0] > 500


def test_a_step_of_its_own_direction_has_cosine_one(tmp_path: Path) -> None:
    base, last = model(0), model(2, 0.3)
    half = {name: (base[name] + last[name]) / 2 for name in base}
    for name, held in (("base", base), ("half", half), ("last", last)):
        torch.save(held, tmp_path / f"{name}.pth")
    files = [tmp_path / "half.pth", tmp_path / "last.pth"]
    total = difference.diff(tmp_path / "base.pth", files, Request(w=(1.0,)))[-1]
    steps = total.relative_steps()
    assert steps[0] == pytest.approx(steps[1] / 2, rel=1e-5)
    assert total.cosines() == pytest.approx([1, 1])


def test_infinite_weights_have_no_step(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "base.pth")
    torch.save({"a": torch.tensor([1.0, torch.inf])}, tmp_path / "synth.pth")
    with pytest.raises(ValueError, match="a: not every entry is finite"):
        difference.diff(tmp_path / "base.pth", [tmp_path / "synth.pth"], Request(w=(1.0,)))
