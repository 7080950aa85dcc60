"""Peak memory of reading, writing and merging, counted in tensors (tests/memory.py).

They are larger than 32 MiB: such blocks malloc gives back to the system at once, unless they found a place among blocks
that were freed before.
"""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neon import merge
from neon.checkpoints import checkpoint
from neon.merge_files import merging
from neon.merge_files.pairing import Request
from tests import memory
from tests.core import pickles

NUM_TENSORS, ROWS, COLUMNS = 3, 5120, 2048
TENSOR_MIB = ROWS * COLUMNS * 4 / 2**20

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory is measured through /proc (Linux)"
)


def tensors_held(work: Callable[[], object]) -> float:
    """The peak during `work`, in tensors."""
    gc.collect()
    before = memory.begin_peak()
    work()
    return (memory.peak() - before) / 1024 / TENSOR_MIB


def tensors(offset: float) -> dict[str, torch.Tensor]:
    return {f"{i}.weight": torch.full((ROWS, COLUMNS), i + offset) for i in range(NUM_TENSORS)}


def test_a_merge_of_files_holds_three_tensors_whatever_the_size_of_the_models(tmp_path):
    checkpoint.write(tmp_path / "base.safetensors", tensors(0.0), metadata={})
    checkpoint.write(tmp_path / "synth.safetensors", tensors(0.5), metadata={})

    def merge_files() -> None:
        base, synth = (checkpoint.read(tmp_path / f"{name}.safetensors").tensors for name in ("base", "synth"))
        checkpoint.write_streaming(
            tmp_path / "out.safetensors", base, merge.merged_entries(base, synth, 1.5), metadata={}
        )

    assert 2.9 < tensors_held(merge_files) < 3.3  # base, synth, and the step that becomes the merged one
    merged = checkpoint.read(tmp_path / "out.safetensors").tensors
    assert [merged[f"{i}.weight"][0, 0].item() for i in range(NUM_TENSORS)] == [-0.75, 0.25, 1.25]


def test_what_earlier_work_left_to_malloc_does_not_hide_a_tensor():
    """A tensor that finds its place in the heap between blocks of before counts like any other."""
    torch.empty(31 * 2**20, dtype=torch.uint8)  # malloc learns from its end: blocks up to 31 MiB come from the heap
    *blocks, last = [torch.ones(2**20) for _ in range(31)]  # 4 MiB each
    blocks.clear()  # the heap cannot shrink: the last lies at its end
    assert 0.9 < tensors_held(lambda: torch.ones(ROWS, COLUMNS)) < 1.1
    assert last.all()


@pytest.mark.parametrize("kind", ["a.safetensors", "a.pth", "old.pth", "a.pkl"])
def test_loading_takes_one_or_two_tensors_beside_the_model(tmp_path, monkeypatch, kind):
    held = tensors(0.0)
    model = torch.nn.Sequential(*(torch.nn.Linear(COLUMNS, ROWS, bias=False, device="meta") for _ in held)).to_empty(
        device="cpu"
    )
    for parameter, value in zip(model.parameters(), held.values(), strict=True):
        parameter.data.copy_(value)
    if kind == "a.pkl":
        pickles.write(monkeypatch, tmp_path / kind, {"ema": pickles.persistent_module(model, "IMMPrecond", {})})
    elif kind == "a.safetensors":
        checkpoint.write(tmp_path / kind, held, metadata={})
    else:
        torch.save(held, tmp_path / kind, _use_new_zipfile_serialization=kind == "a.pth")
    for parameter in model.parameters():
        parameter.data.fill_(-1)
    most = 2.1 if kind == "a.pkl" else 1.1  # an embedded tensor passes through memory once while the pickle is decoded
    assert tensors_held(lambda: checkpoint.read(tmp_path / kind).load_into(model)) < most
    assert all(
        torch.equal(parameter, value) for parameter, value in zip(model.parameters(), held.values(), strict=True)
    )


def test_a_merge_in_one_pass_holds_pieces_only(tmp_path):
    """Less than one tensor of 40 MiB, hashes, statistics and two outputs included."""
    for name, offset in (("base", 0.0), ("synth", 0.5)):
        checkpoint.write(tmp_path / f"{name}.safetensors", tensors(offset), metadata={})
    inputs = tmp_path / "base.safetensors", tmp_path / "synth.safetensors"
    pairs = [inputs, [path.with_name(f"small-{path.name}") for path in inputs]]
    for path, offset in zip(pairs[1], (0.0, 0.5), strict=True):  # threads and libraries start once
        checkpoint.write(path, {"w": torch.full((600, 600), offset)}, metadata={})
    merging.merge(*pairs[1], tmp_path / "small.safetensors", Request(w=(1.5, 0.5)))
    held = tensors_held(lambda: merging.merge(*inputs, tmp_path / "out.safetensors", Request(w=(1.5, 0.5))))
    assert held < 1.0
    merged = checkpoint.read(tmp_path / "out_w1.5.safetensors").tensors
    assert [merged[f"{i}.weight"][0, 0].item() for i in range(NUM_TENSORS)] == [-0.75, 0.25, 1.25]
