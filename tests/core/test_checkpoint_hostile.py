"""Files that once hung the reader, filled memory, ended in a traceback, or were refused though they are valid."""

import json
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from neon.checkpoints import checkpoint, inert_pickle
from neon.checkpoints.describe import describe
from neon.cli.main import main
from neon.family import resolve
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
    data = 0 if isinstance(header, dict) and "__metadata__" in header else 4
    path = header_file(tmp_path / "a.safetensors", header, data)
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


FLOODS = {
    "lists": b"]" * 600_000,
    "sets": b"\x8f" * 600_000,
    "tuples": b"N\x85" * 600_000,
    "floats": (b"G" + bytes(8)) * 600_000,
    "marks": b"(" * 20_000,
    "memo": b"\x94" * 120_000,
    "texts": (b"X\xff\xff\x00\x00" + b"x" * 0xFFFF) * 200,
    "wide texts": (b"X\x03\xff\x00\x00" + "\U0001f600".encode() + b"x" * 0xFEFF) * 60,
    "lines": (b"V" + b"x" * 60_000 + b"\n") * 200,
    "entries": b"}" + b"".join(b"(" + b"".join(b"J%cxxxN" % i for i in range(97, 123)) + b"u" for _ in range(5000)),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_pickle_has_a_bound_of_memory(tmp_path, monkeypatch, kind):
    """Many small things are refused as a few large ones are. The bound is lowered here so that files stay small."""
    monkeypatch.setattr(inert_pickle, "MAX_MEMORY", 10 << 20)
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x02N" + FLOODS[kind] + b".")
    with pytest.raises(ValueError, match=r"a\.pkl: it (unfolds into more than 10,485,760 bytes|leaves|is nested)"):
        checkpoint.read(path)


@pytest.mark.parametrize("place", [b"}N%bNs.", b"}X\x03\x00\x00\x00emaN%bs."])
def test_a_tuple_150_000_deep_is_refused(tmp_path, place):
    """As a key it ended the process: hashing it took all of the stack."""
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x02" + place % (b"\x85" * 150_000))
    with pytest.raises(ValueError, match=r"a\.pkl: (it uses a tuple of 1 as a key|no weights found)"):
        checkpoint.read(path)


def test_a_header_of_too_many_values_is_not_parsed(tmp_path):
    path = header_file(tmp_path / "a.safetensors", b'{"a":[' + b"[]," * 2_000_000 + b"1]}")
    with pytest.raises(ValueError, match="its header holds more than 4,000,000 values"):
        checkpoint.read(path)


@pytest.mark.parametrize("offsets", [[4, 8], [0, 4]])
def test_a_header_that_leaves_bytes_to_nobody_is_refused(tmp_path, offsets):
    """As the safetensors library does: a header whose offsets were damaged must not read other numbers."""
    path = header_file(tmp_path / "a.safetensors", {"w": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}, 8)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(path)
    with pytest.raises(ValueError, match=r"a\.safetensors: bytes of it belong to no tensor"):
        checkpoint.read(path)


def test_our_metadata_is_sealed(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, {"w": torch.ones(2)}, metadata={"family": "edm", "arch": {"sigma_data": 0.5}})
    assert checkpoint.read(path).arch == {"sigma_data": 0.5}
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.7"))
    with pytest.raises(ValueError, match=r"a\.safetensors: our metadata: damaged, its content is not what was written"):
        checkpoint.read(path)


def archive_with(path, change):
    """What torch.save wrote, with some of its bytes changed."""
    torch.save({"a": torch.arange(100.0), "view": torch.arange(50.0)[10:], "b": torch.ones(100)}, path)
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def flipped_data(content):
    content[content.index(struct.pack("<f", 41.0))] ^= 1  # of "a" and, first, of nothing else


def flipped_view(content):
    content[content.rindex(struct.pack("<f", 41.0))] ^= 1


def renamed(content):
    """The directory calls the first record as the third one and the other way round."""
    names = [content.rindex(b"data/0"), content.rindex(b"data/2")]
    content[names[0] + 5], content[names[1] + 5] = b"20"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flipped_data, "the checksum of archive/data/0 is wrong"),
        (flipped_view, "the checksum of archive/data/1 is wrong"),
        (renamed, "is not where the directory of the zip file says"),
    ],
)
def test_damaged_bytes_of_an_archive_are_found(tmp_path, change, message):
    path = archive_with(tmp_path / "archive.pth", change)
    with pytest.raises(ValueError, match=message):
        dict(checkpoint.read(path).tensors)
    checkpoint.write(
        tmp_path / "base.safetensors", torch.load(archive_with(tmp_path / "b.pth", lambda _: None)), metadata={}
    )
    result = CliRunner().invoke(
        main, ["merge", f"{tmp_path}/base.safetensors", str(path), "--w", "1", "--out", f"{tmp_path}/out.safetensors"]
    )
    assert result.exit_code == 1
    assert message in result.output
    assert str(path) in result.output
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="torch 2.5 always writes checksums")
def test_an_archive_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.read(tmp_path / "a.pth").tensors["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_blocks", 10**7), ("num_blocks", 10**400), ("num_blocks", 5000), ("channel_mult", [0, 2]),
     ("channel_mult", [1] * 10**5), ("model_channels", 0), ("model_channels", -1), ("img_channels", 2**63),
     ("class_name", [1] * 10**5)],
)  # fmt: skip
def test_absurd_arguments_of_a_network_are_refused_at_once(key, value):
    found = checkpoint.read(Path(__file__).parents[2] / "demo/base.safetensors")
    began = time.process_time()
    with pytest.raises(ValueError, match=r"base\.safetensors: its arguments \(arch\) make no network") as error:
        resolve("edm").load(replace(found, arch={**found.arch, key: value}))
    assert len(str(error.value)) < 1000
    assert time.process_time() - began < 2
