"""Layouts, weight sets, strict loading and writing. torch and safetensors themselves are the independent readers and
writers."""

import argparse
import io
import json
from collections import OrderedDict

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from neon.checkpoints import checkpoint
from neon.checkpoints.describe import describe
from neon.store import files


def network(width: int = 3) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(
        OrderedDict(first=nn.Linear(4, width), norm=nn.BatchNorm1d(width), last=nn.Linear(width, 2, bias=False))
    )


def state(scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        name: value * scale if value.is_floating_point() else value for name, value in network().state_dict().items()
    }


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


EMA, RAW = state(1.0), state(2.0)
LAYOUTS = {
    "DiT": ({"ema": EMA, "model": RAW, "opt": {"step": 3}}, {"ema": EMA, "raw": RAW}),
    "xAR training": (
        {"model_ema": EMA, "model": RAW, "epoch": 1, "args": argparse.Namespace(lr=1e-4)},
        {"ema": EMA, "raw": RAW},
    ),
    "xAR published": ({"model_ema": EMA, "epoch": 1}, {"ema": EMA}),
    "TorchCFM": (
        {"ema_model": EMA, "net_model": RAW, "step": 400_000, "sched": {"lr_lambdas": [None]}},
        {"ema": EMA, "raw": RAW},
    ),
    "VAR trainer": (
        {"epoch": 1, "trainer": {"config": None, "var_wo_ddp": RAW, "vae_local": EMA}, "args": {}},
        {"raw": RAW, "trainer/vae_local": EMA},
    ),
    "KL-16": ({"model": RAW}, {"raw": RAW}),
    "bare": (RAW, {"unnamed": RAW}),
    "bare OrderedDict": (network().state_dict(), {"unnamed": EMA}),
    "state_dict": ({"state_dict": RAW, "hyper_parameters": {}}, {"unnamed": RAW}),
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old stream"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_torch_layout_gives_its_weight_sets(tmp_path, layout, is_zip):
    content, expected = LAYOUTS[layout]
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    for weights, tensors in expected.items():
        found = checkpoint.read(tmp_path / "a.pth", weights=weights)
        assert found.weights == weights
        assert_equal(found.tensors, tensors)
    assert set(describe(tmp_path / "a.pth")["weights"]) == set(expected)


@pytest.mark.parametrize("layout", ["KL-16", "VAR trainer"])
def test_a_missing_ema_is_an_error_that_lists_what_is_there(tmp_path, layout):
    torch.save(LAYOUTS[layout][0], tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"a\.pth holds no 'ema' weights; it holds 'raw' \(under .*(model|var_wo_ddp)\)"
    ):
        checkpoint.read(tmp_path / "a.pth")


def test_any_takes_the_only_set_and_refuses_to_choose(tmp_path):
    torch.save({"model": RAW}, tmp_path / "one.pth")
    assert_equal(checkpoint.read(tmp_path / "one.pth", weights="any").tensors, RAW)
    torch.save({"ema": EMA, "model": RAW}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"holds more than one set of weights; it holds 'ema'.*'raw'"):
        checkpoint.read(tmp_path / "two.pth", weights="any")


def test_a_bare_file_answers_to_every_name_and_says_that_it_has_none(tmp_path):
    torch.save(RAW, tmp_path / "bare.pth")
    for weights in ("ema", "raw", "any"):
        assert checkpoint.read(tmp_path / "bare.pth", weights=weights).weights == "unnamed"


def test_two_sets_of_one_kind_are_not_chosen_between(tmp_path):
    torch.save({"ema": EMA, "model_ema": RAW}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="two sets of ema weights, ema and model_ema"):
        checkpoint.read(tmp_path / "a.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_wrappers_prefixes_are_dropped_said_and_never_saved(tmp_path, caplog, prefix):
    torch.save({"ema": {prefix + name: value for name, value in EMA.items()}}, tmp_path / "a.pth")
    found = checkpoint.read(tmp_path / "a.pth")
    assert_equal(found.tensors, EMA)
    assert prefix in caplog.text
    checkpoint.convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert safetensors.torch.load_file(tmp_path / "b.safetensors").keys() == EMA.keys()


def test_a_compiled_part_and_a_real_module_called_module(tmp_path):
    torch.save({"body._orig_mod.weight": EMA["first.weight"], "module.weight": EMA["last.weight"]}, tmp_path / "a.pth")
    assert list(checkpoint.read(tmp_path / "a.pth").tensors) == ["body.weight", "module.weight"]


def can_save(dtype: torch.dtype) -> bool:
    """torch 2.5 has tensors of unsigned integers, but no storage to save them in."""
    try:
        torch.save(torch.zeros(1, dtype=dtype), io.BytesIO())
    except KeyError:
        return False
    return True


def test_torch_tensors_of_every_dtype_shape_and_stride(tmp_path):
    grid = torch.arange(60, dtype=torch.float64).reshape(3, 4, 5)
    tensors = {
        "transposed": grid.transpose(0, 2),
        "slice": grid[1, 1:3],
        "expanded": torch.ones(1, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "mask": torch.full((2, 2), -torch.inf),
        "parameter": nn.Parameter(torch.randn(3)),
        **{
            str(dtype): torch.tensor([0, 1, 3]).to(dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.uint16)
        },
    }
    for is_zip in (True, False):
        if not (is_zip and can_save(torch.uint16)):
            tensors.pop("torch.uint16", None)  # the old stream has no such storage
        torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
        assert_equal(checkpoint.read(tmp_path / "a.pth").tensors, torch.load(tmp_path / "a.pth", weights_only=True))


def test_a_hugging_face_index_with_two_shards(tmp_path):
    names = list(EMA)
    shards = {"a-1.safetensors": names[:3], "a-2.safetensors": names[3:]}
    for file, held in shards.items():
        safetensors.torch.save_file(
            {name: EMA[name].contiguous() for name in held}, tmp_path / file, metadata={"format": "pt"}
        )
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = checkpoint.read(index)
    assert_equal(found.tensors, EMA)
    before = found.sha256
    assert checkpoint.convert(index, tmp_path / "one.safetensors").sha256 == files.sha256_of(
        tmp_path / "one.safetensors"
    )
    safetensors.torch.save_file({name: RAW[name].contiguous() for name in names[3:]}, tmp_path / "a-2.safetensors")
    assert checkpoint.read(index).sha256 != before
    index.write_text(json.dumps({"weight_map": weight_map | {"extra": "a-1.safetensors"}}))
    with pytest.raises(ValueError, match=r"1 of .* not in the shards .*extra"):
        checkpoint.read(index)
    index.write_text(json.dumps({"weight_map": {"x": "../a-1.safetensors"}}))
    with pytest.raises(ValueError, match="not a plain file name"):
        checkpoint.read(index)


def test_what_is_written_comes_back_and_other_readers_agree(tmp_path):
    tensors = {
        "z.flag": torch.tensor(True),
        "a.counter": torch.tensor(2**40),
        "half": torch.randn(3).bfloat16(),
        "mask": torch.tensor([[0.0, -torch.inf]]),
        "empty": torch.zeros(0, 2),
        "strided": torch.arange(6.0).reshape(2, 3).T,
        "bools": torch.tensor([True, False, True]),
        "wide": torch.randn(5, dtype=torch.float64),
    }
    metadata = {"family": "edm", "arch": {"label_dim": 10}, "weights": "ema", "w": 1.25, "base_sha256": "ab"}
    checkpoint.write(tmp_path / "a.safetensors", tensors, metadata=metadata)
    found = checkpoint.read(tmp_path / "a.safetensors")
    assert_equal(found.tensors, tensors)
    assert (found.family, found.arch, found.weights) == ("edm", {"label_dim": 10}, "ema")
    assert found.meta == {"format": 1, **metadata}
    assert {
        name: value.tolist() for name, value in safetensors.torch.load_file(tmp_path / "a.safetensors").items()
    } == {name: value.tolist() for name, value in tensors.items()}
    addresses = {name: entry.storage.offset % tensors[name].itemsize for name, entry in found.tensors.entries.items()}
    assert set(addresses.values()) == {0}  # memory-mapping readers need aligned tensors
    with pytest.raises(ValueError, match="holds no 'raw' weights; it holds 'ema'"):
        checkpoint.read(tmp_path / "a.safetensors", weights="raw")


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(100, 50), nn.Linear(50, 100, bias=False)
            self.head.weight = self.embed.weight

    model, other = Tied(), Tied()
    checkpoint.write(tmp_path / "a.safetensors", model.state_dict(), metadata={})
    assert (tmp_path / "a.safetensors").stat().st_size < 1.5 * 100 * 50 * 4
    torch.save(model.state_dict(), tmp_path / "a.pth")
    checkpoint.convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    for file in ("a.safetensors", "b.safetensors", "a.pth"):
        found = checkpoint.read(tmp_path / file)
        assert found.tensors.aliases == {"head.weight": "embed.weight"}
        found.load_into(other)
        assert other.head.weight is other.embed.weight
        assert torch.equal(other.head.weight, model.head.weight)
    safetensors.torch.load_model(Tied(), tmp_path / "b.safetensors")  # the library's own convention for ties


def test_a_stream_of_values_is_checked_against_what_was_announced(tmp_path):
    specs = {"a": torch.zeros(2), "b": torch.zeros(3)}
    path = tmp_path / "a.safetensors"
    backwards = [("b", torch.ones(3)), ("a", torch.zeros(2))]
    checkpoint.write_streaming(path, specs, iter(backwards), metadata={})
    assert_equal(checkpoint.read(path).tensors, {"a": torch.zeros(2), "b": torch.ones(3)})
    wrong = {
        "1 of 2 tensors did not come; first: b": backwards[1:],
        r"b is \(4,\) .* announced was \(3,\)": [("b", torch.ones(4))],
        "b is .*float64, announced was .*float32": [("b", torch.ones(3, dtype=torch.float64))],
        "c is .* announced was nothing of that name": [("c", torch.ones(1))],
        "announced was one": [backwards[0], backwards[0]],
    }
    for message, values in wrong.items():
        with pytest.raises(ValueError, match=message):
            checkpoint.write_streaming(path, specs, values, metadata={})
        assert_equal(checkpoint.read(path).tensors, {"a": torch.zeros(2), "b": torch.ones(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_strict_loading_in_one_line_that_says_what_does_not_fit(tmp_path):
    deep = nn.Module()
    deep.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
    checkpoint.write(tmp_path / "d6.safetensors", deep.state_dict(), metadata={})
    found = checkpoint.read(tmp_path / "d6.safetensors")
    shallow = nn.Module()
    shallow.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    sizes = r"\(4 blocks, 24 numbers in 8 tensors\), .* \(6 blocks, 36 numbers in 12 tensors\)"
    expected = r"d6\.safetensors does not fit: expected Module " + sizes
    with pytest.raises(
        ValueError, match=expected + r"; 0 missing, 4 unexpected, 0 of another shape; first: blocks\.4\.weight"
    ) as error:
        found.load_into(shallow)
    assert "\n" not in str(error.value)
    shallow.blocks[0], shallow.extra = nn.Linear(2, 5), nn.Linear(1, 1)
    with pytest.raises(
        ValueError,
        match=r"2 missing, 4 unexpected, 2 of another shape; first: blocks\.0\.weight \(2, 2\) instead of \(5, 2\)",
    ):
        found.load_into(shallow)


def test_loading_gives_the_weights_and_no_memory_in_common(tmp_path):
    checkpoint.write(tmp_path / "a.safetensors", EMA, metadata={})
    found = checkpoint.read(tmp_path / "a.safetensors")
    one, two = network(), network()
    with torch.device("meta"):
        three = network()
    parameters = list(one.parameters())
    for model in (one, two, three):
        found.load_into(model)
        assert_equal(model.state_dict(), EMA)
    assert all(a is b for a, b in zip(parameters, one.parameters(), strict=True))  # optimisers keep their parameters
    with torch.no_grad():
        one.first.weight.zero_()
    assert_equal(two.state_dict(), EMA)
    three(torch.randn(5, 4)).sum().backward()
    assert three.first.weight.grad is not None


def test_a_checkpoint_over_tensors_in_memory_does_not_share_them():
    mine = {name: value.clone() for name, value in EMA.items()}
    model = network()
    checkpoint.Checkpoint(mine, None, None, "ema", path=None).load_into(model)
    with torch.no_grad():
        model.first.weight.zero_()
    assert_equal(mine, EMA)


def test_integer_buffers_stored_as_floats_and_back(tmp_path):
    class Levels(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.register_buffer("lvl_1L", torch.tensor([[0, 1, 1, 2]]).to(dtype))

    for stored, wanted in ((torch.float32, torch.int64), (torch.int64, torch.float32), (torch.int64, torch.int64)):
        checkpoint.write(tmp_path / "a.safetensors", {"lvl_1L": torch.tensor([[0, 1, 1, 3]]).to(stored)}, metadata={})
        model = Levels(wanted)
        checkpoint.read(tmp_path / "a.safetensors").load_into(model)
        assert model.lvl_1L.dtype == wanted
        assert model.lvl_1L.tolist() == [[0, 1, 1, 3]]
    checkpoint.write(tmp_path / "a.safetensors", {"lvl_1L": torch.tensor([[0, 1, 1.5, 3]])}, metadata={})
    with pytest.raises(
        ValueError, match=r"lvl_1L is stored as torch\.float32 with values that torch\.int64 cannot hold"
    ):
        checkpoint.read(tmp_path / "a.safetensors").load_into(Levels(torch.int64))


def test_a_file_that_was_replaced_meanwhile_is_not_read_at_old_offsets(tmp_path):
    checkpoint.write(tmp_path / "a.safetensors", EMA, metadata={})
    found = checkpoint.read(tmp_path / "a.safetensors")
    checkpoint.write(tmp_path / "a.safetensors", RAW | {"more": torch.zeros(9)}, metadata={})
    with pytest.raises(ValueError, match=r"a\.safetensors changed while it was in use"):
        found.tensors["first.weight"]


def test_describe_counts(tmp_path):
    torch.save({"ema": EMA, "model": RAW}, tmp_path / "a.pth")
    about = describe(tmp_path / "a.pth")
    assert about["format"] == "torch"
    assert about["weights"]["ema"]["dtypes"] == {"float32": 7, "int64": 1}
    assert about["weights"]["ema"]["elements"] == sum(value.numel() for value in EMA.values())
    assert len(about["sha256"]) == 64
    np.savez(tmp_path / "ref.npz", mu=np.zeros(8), sigma=np.zeros((8, 8), np.float32), num_images=np.int64(50_000))
    assert describe(tmp_path / "ref.npz")["arrays"] == {
        "mu": {"shape": [8], "dtype": "float64"},
        "sigma": {"shape": [8, 8], "dtype": "float32"},
        "num_images": {"shape": [], "dtype": "int64", "value": 50_000},
    }
