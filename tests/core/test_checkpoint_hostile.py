"""Files that once hung the reader, filled memory, ended in a traceback, or were refused though they are valid."""

import json
import sys
import time

import pytest
import safetensors.torch
import torch

from neon.checkpoints import checkpoint
from neon.checkpoints.describe import describe
from tests.core import pickles


def header_file(path, header: object, data: int = 4, length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


@pytest.mark.parametrize("length", [0x3C, 0x0A3C, 0x3C20])
def test_a_header_whose_length_looks_like_html_is_read(tmp_path, length):
    entry = {"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(entry, separators=(",", ":")).encode().ljust(length)
    path = header_file(tmp_path / "a.safetensors", text)
    assert safetensors.torch.load_file(path)["w"].tolist() == [0] * 4  # the library reads it
    assert checkpoint.read(path).tensors["w"].tolist() == [0] * 4


def doubled(levels: int, kind: type) -> object:
    value: object = "x"
    for _ in range(levels):
        value = kind((value, value))
    return value


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("where", ["_init_kwargs", "dataset_kwargs", "key"])
def test_what_unfolds_to_billions_is_refused_at_once(tmp_path, monkeypatch, kind, where):
    value = doubled(40, kind)
    module = pickles.persistent_module(pickles.network(), "EDMPrecond", {"a": value} if where == "_init_kwargs" else {})
    saved = {"ema": module, "dataset_kwargs": {"a": value} if where == "dataset_kwargs" else None}
    path = pickles.write(monkeypatch, tmp_path / "a.pkl", saved)
    message = r"a\.pkl: it unfolds into more than"
    if where == "key":
        path.write_bytes(b"\x80\x02}U\x01x" + b"2\x86" * 40 + b"Ns.")
        message = r"a\.pkl: it uses a tuple of 2 as a key"
    began = time.process_time()
    with pytest.raises(ValueError, match=message):
        checkpoint.read(path)
    with pytest.raises(ValueError, match=message):
        describe(path)
    assert time.process_time() - began < 2


def test_a_module_that_holds_another_twice_40_deep(tmp_path, monkeypatch):
    module = torch.nn.Module()
    for _ in range(40):
        outer = torch.nn.Module()
        outer.a = outer.b = module
        module = outer
    path = pickles.write(monkeypatch, tmp_path / "a.pkl", {"ema": pickles.persistent_module(module, "EDMPrecond", {})})
    with pytest.raises(ValueError, match="unfolds into more than 1,000,000 modules"):
        checkpoint.read(path)


HEADERS = {
    "1e999": ({"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}, "expected a size as a whole number"),
    "2**63": (
        {"w": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}},
        "expected a size as a whole number",
    ),
    "overflow": ({"w": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, "more numbers than any"),
    "60,000 dimensions": ({"w": {"dtype": "F32", "shape": [1] * 60_000, "data_offsets": [0, 4]}}, "at most 64"),
    "true": ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "found True"),
    "E8M0": ({"w": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}, "has dtype F8_E8M0; supported are F64"),
    "F4": ({"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, "has dtype F4"),
    "dtype list": ({"w": {"dtype": [], "shape": [8], "data_offsets": [0, 4]}}, "has dtype"),
    "metadata": ({"__metadata__": {"neon": "[]"}}, "our metadata is not a JSON object"),
    "arch": ({"__metadata__": {"neon": '{"arch": [1]}'}}, "arch = .*expected a dict"),
    "family": ({"__metadata__": {"neon": '{"family": {}}'}}, "family = .*expected a str"),
    "weights": ({"__metadata__": {"neon": '{"weights": [1]}'}}, "weights = .*expected a str"),
    "twice": (b'{"a": 1, "a": 2}', "a name comes twice"),
    "deep": (b'{"a":' + b"[" * 100_000, "not JSON"),
    "long name": ({"n" * 1_000_000: {"dtype": "F3"}}, "header entry"),
    "surrogate": ({"\ud800\n": {"dtype": "F3"}}, r"\\\\ud800\\\\n: its header"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_odd_headers_are_one_short_line(tmp_path, kind):
    header, message = HEADERS[kind]
    path = header_file(tmp_path / "a.safetensors", header)
    with pytest.raises(ValueError, match=message.replace("\\\\\\\\", "\\\\")) as error:
        describe(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1500


def test_a_whole_module_says_how_to_make_a_state_dict(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(1, 1)), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"found torch\.nn.*Sequential.*torch\.save\(torch\.load"):
        checkpoint.read(tmp_path / "a.pth")


def test_many_tensors_take_work_in_proportion(tmp_path):
    """Counted in function calls: seconds differ from machine to machine."""

    def cost(count: int) -> int:
        tensors = {f"blocks.{i}.weight": torch.ones(1) for i in range(count)}
        path = tmp_path / f"{count}.safetensors"
        checkpoint.write(path, tensors, metadata={})
        calls = 0

        def counted(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(counted)
        try:
            checkpoint.read(path)
        finally:
            sys.setprofile(None)
        return calls

    assert cost(4_000) < 4.5 * cost(1_000)


def test_an_index_larger_than_any_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.write(b'{"weight_map": {"a": "')
        file.truncate(200_000_000)
    with pytest.raises(ValueError, match="an index of shards has at most"):
        checkpoint.read(path)
