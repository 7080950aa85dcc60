"""The one-pass merge of files against the definition, for any mixture of dtypes, shards, order and w."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from neon.checkpoints import checkpoint, one_pass
from neon.merge import reverse_merge
from neon.merge_files.merging import merge
from neon.merge_files.pairing import Request

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 3)]

models = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(SHAPES)), min_size=1, max_size=5
)
numbers = st.sampled_from([0.0, -1.0, 1.0, 0.3, 1.2, 2.6, -0.4, 17.0])
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def tensors(model: list, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    base, synth = {}, {}
    for i, (dtype, other, shape) in enumerate(model):
        base[f"{i}.weight"] = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        synth[f"{i}.weight"] = (base[f"{i}.weight"] + 0.1 * torch.randn(shape, generator=g)).to(other)
    extra = {"n.running_var": torch.rand(3, generator=g), "n.num_batches_tracked": torch.tensor(seed)}
    return base | extra, synth | {name: value + 1 for name, value in extra.items()}


def sharded(folder: Path, held: dict[str, Tensor], order: list[int], num_shards: int) -> Path:
    """The tensors in some order over some shards, with an index."""
    folder.mkdir()
    names = list(held)
    names = [names[i % len(names)] for i in order] + names
    names = list(dict.fromkeys(names))
    weight_map = {
        name: f"model-{i % num_shards + 1:05d}-of-{num_shards:05d}.safetensors" for i, name in enumerate(names)
    }
    for shard in set(weight_map.values()):
        part = {name: held[name] for name in names if weight_map[name] == shard}
        safetensors.torch.save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


def bits(held: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in held.items()}


@quick
@given(models, numbers, st.integers(0, 5), st.integers(1, 3), st.lists(st.integers(0, 6), max_size=6))
def test_a_merge_of_shards_is_the_definition_bit_for_bit(model, w, seed, num_shards, order):
    base, synth = tensors(model, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        safetensors.torch.save_file(synth, folder / "synth.safetensors")
        merge(
            sharded(folder / "base", base, order, num_shards),
            sharded(folder / "s", synth, [], 2),
            folder / "out",
            Request(w=(w,)),
        )
        found = dict(checkpoint.read(folder / "out").tensors)
    assert bits(found) == bits(reverse_merge(base, synth, w))
    assert bits({n: v for n, v in found.items() if n[0] == "n"}) == bits({n: v for n, v in base.items() if n[0] == "n"})


@quick
@given(models, st.integers(0, 5))
def test_fixed_points_and_rounding(model, seed):
    """w = 0 is the base and w = -1 the other model, bit for bit; half precision is the exact value, rounded once to
    float32 and then to the dtype; float32 is within one unit in the last place of its largest term."""
    base, synth = tensors(model, seed)
    parameters = [name for name in base if name[0] != "n"]
    assert bits(reverse_merge(base, synth, 0.0)) == bits(base)
    other = reverse_merge(base, synth, -1.0)
    assert bits({n: other[n] for n in parameters}) == bits({n: synth[n].to(base[n].dtype) for n in parameters})
    merged = reverse_merge(base, synth, 1.2)
    for name in parameters:
        b, s = base[name], synth[name]
        wide = torch.float64 if torch.float64 in (b.dtype, s.dtype) else torch.float32
        exact = b.double() - 1.2 * (s.to(wide) - b.to(wide)).double()
        if b.dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(merged[name], exact.float().to(b.dtype))
        elif b.numel():
            size = torch.maximum(b.double().abs(), exact.abs()).max().item()
            assert (merged[name].double() - exact).abs().max().item() <= 2 * torch.finfo(b.dtype).eps * (size + 1)


@quick
@given(st.integers(0, 50), numbers, numbers)
def test_affine_in_w(seed, first, second):
    base, synth = tensors([(torch.float64, torch.float64, (4,))], seed)
    at = {w: reverse_merge(base, synth, w)["0.weight"] for w in (first, second, (first + second) / 2)}
    torch.testing.assert_close(at[(first + second) / 2], (at[first] + at[second]) / 2, rtol=0, atol=1e-13)


def test_pieces_do_not_show(tmp_path, monkeypatch):
    """Tensors of many pieces, some of them strided, some with infinities in a late piece."""
    monkeypatch.setattr(one_pass, "CHUNK", 64)
    torch.manual_seed(0)
    mask = torch.zeros(20, 20)
    mask[15:, 3] = -torch.inf
    base = {"t": torch.randn(30, 40).bfloat16().T, "f": torch.randn(333), "mask": mask, "p": torch.randn(500)}
    base["p"][450] = torch.inf
    synth = {name: value.clone() for name, value in base.items()}
    synth["t"], synth["f"] = synth["t"] + 0.25, synth["f"] * 1.1
    synth["mask"] = torch.where(torch.rand(20, 20) < 0.1, -torch.inf, mask)
    synth["p"][:100] += 1
    for name, held in (("base", base), ("synth", synth)):
        torch.save(held, tmp_path / f"{name}.pth")
    files = tmp_path / "base.pth", tmp_path / "synth.pth", tmp_path / "out.safetensors"
    merge(*files, Request(w=(1.5,), on_mismatch="keep_base"))
    assert bits(safetensors.torch.load_file(files[2])) == bits(reverse_merge(base, synth, 1.5, on_mismatch="keep_base"))


def test_hashes_are_those_of_the_files_and_several_w_are_several_merges(tmp_path):
    base, synth = tensors([(torch.bfloat16, torch.float32, (300, 40)), (torch.float32, torch.float32, (5,))], 0)
    torch.save(base, tmp_path / "base.pth")
    safetensors.torch.save_file(synth, tmp_path / "synth.safetensors")
    files = tmp_path / "base.pth", tmp_path / "synth.safetensors"
    about = merge(*files, tmp_path / "out.safetensors", Request(w=(0.5, 1.0, -1.0), check=True))
    assert [Path(done["out"]).name for done in about["merged"]] == [
        "out_w0.5.safetensors", "out_w1.safetensors", "out_w-1.safetensors"
    ]  # fmt: skip
    for done in about["merged"]:
        path = Path(done["out"])
        single = merge(*files, tmp_path / "one.safetensors", Request(w=(done["w"],)))
        assert path.read_bytes() == (tmp_path / "one.safetensors").read_bytes()
        assert done["sha256"] == checkpoint.read(path).sha256 == single["sha256"]
        meta = checkpoint.read(path).meta
        hashes = [checkpoint.read(file, weights="auto").sha256 for file in files]
        assert [meta["base_sha256"], meta["synth_sha256"]] == hashes
