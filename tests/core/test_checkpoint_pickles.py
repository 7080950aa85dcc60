"""EDM's and IMM's pickles: what they hold is read, and nothing of them runs."""

import argparse
import builtins
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from neon.checkpoints import checkpoint
from neon.checkpoints.describe import describe
from neon.checkpoints.inert_pickle import Record
from neon.checkpoints.torch_format import plain
from tests import goldens
from tests.core import pickles
from tests.core.test_checkpoint import assert_equal

GOOD = [
    file
    for family in ("edm", "imm")
    for file in goldens.files(family)
    if file.suffix == ".pkl" and "evil" not in file.name
]
EVIL = [file for family in ("edm", "imm") for file in goldens.files(family) if file.name.endswith("_evil.pkl")]


@pytest.mark.parametrize("file", GOOD, ids=lambda file: file.name)
def test_golden_pickles_give_their_tensors_and_constructor_arguments(file):
    found = checkpoint.read(file)
    stem = re.sub("_(trap|proto2|oldlayout)$", "", file.stem)  # the same tensors in other clothes
    config, arrays = goldens.load(file.with_name(f"{stem}_expected.npz"))
    assert found.family == file.parent.name
    assert found.arch == {"class_name": config["class_name"], **config["init_kwargs"]}
    if file.parent.name == "edm":
        expected = {
            name.removeprefix("sd/"): goldens.tensor(array) for name, array in arrays.items() if name.startswith("sd/")
        }
        assert_equal(found.tensors, expected)
    else:
        assert {name: [*value.shape, str(value.dtype)] for name, value in found.tensors.items()} == config["keys"]
        for name, value in found.tensors.items():
            assert value.flatten()[:8].tolist() == arrays[f"head:{name}"].tolist()
            assert value.double().sum().item() == pytest.approx(float(arrays[f"sum:{name}"]), abs=1e-9)


@pytest.mark.parametrize("file", EVIL, ids=lambda file: file.name)
def test_golden_pickles_with_a_foreign_name_are_refused_by_name_and_do_not_run(file, monkeypatch):
    calls = []
    for module, name in ((os, "getenv"), (os, "system"), (builtins, "eval"), (builtins, "exec")):
        monkeypatch.setattr(module, name, lambda *args, name=name: calls.append(name))
    with pytest.raises(ValueError, match=rf"{file.name}: it refers to '[\w.]+', which no checkpoint needs: refused"):
        checkpoint.read(file)
    assert calls == []


class Payload:
    """Pickles as a call that leaves a trace."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def in_dict(payload):
    return {"note": payload, "ema": torch.zeros(1)}


def as_state(payload):
    return {
        "ema": pickles.Persistent(
            "EDMPrecond", {"_modules": {}, "_parameters": {}, "_buffers": {}, "_init_kwargs": {"x": payload}}
        )
    }


def in_embedded_tensor(payload):
    return {"ema": Payload(torch.storage._load_from_bytes, pickle.dumps(payload))}


@pytest.mark.parametrize("where", [in_dict, as_state, in_embedded_tensor])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_payload_that_works_under_pickle_does_nothing_here(tmp_path, monkeypatch, where, protocol):
    trace = tmp_path / "trace"
    payload = Payload(os.mkdir, str(trace))
    pickle.loads(pickle.dumps(payload))  # our own payload: the tripwire does work
    trace.rmdir()
    pickles.write(monkeypatch, tmp_path / "a.pkl", where(payload), protocol)
    with pytest.raises(ValueError, match=r"a\.pkl: it refers to '(posix|os)\.mkdir'"):
        checkpoint.read(tmp_path / "a.pkl")
    torch.save({"ema": {"w": torch.zeros(1)}, "note": payload}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: it refers to '(posix|os)\.mkdir'"):
        checkpoint.read(tmp_path / "a.pth")
    assert not trace.exists()


@pytest.mark.parametrize("arguments", [(torch.Size, "count"), ([], "append"), (torch.Size,), ("a", "upper", None)])
def test_getattr_is_refused_but_for_the_one_enumeration(tmp_path, arguments):
    class Call:
        def __reduce__(self):
            return getattr, arguments

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": Call()}))
    with pytest.raises(ValueError, match=r"a\.pkl: it calls 'builtins\.getattr', which no checkpoint needs"):
        checkpoint.read(tmp_path / "a.pkl")


FOREIGN = {
    "builtins": ["eval", "exec", "setattr", "__import__", "open", "compile"],
    "os": ["system", "getenv"],
    "posix": ["system"],
    "subprocess": ["Popen"],
    "importlib": ["import_module"],
    "runpy": ["run_path"],
    "pickle": ["loads"],
    "operator": ["attrgetter"],
    "collections": ["abc", "namedtuple"],
    "numpy": ["load", "f2py.crackfortran.myeval"],
    "torch": [
        "load",
        "hub.load",
        "_utils.eval",
        "nn.functional.relu",
        "nn.modules.module.torch",
        "storage._load_from_bytes.__globals__",
    ],
    "timm.models": ["hub.load_model", "create_model"],
    "omegaconf": ["OmegaConf.load"],
}


@pytest.mark.parametrize("name", [f"{module}.{name}" for module, names in FOREIGN.items() for name in names])
def test_names_that_are_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    (tmp_path / "a.pkl").write_bytes(f"c{module}\n{attribute}\n(U\x01xtR.".encode().join([b"\x80\x02", b""]))
    with pytest.raises(ValueError, match=f"it refers to '{name}'"):
        checkpoint.read(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "name", ["argparse.Namespace", "torch.nn.modules.linear.Linear", "builtins.object", "functools.partial"]
)
def test_allowed_names_are_inert(tmp_path, name, monkeypatch):
    """A record takes the place of the call: constructing, giving it a state or items runs no method of the class."""
    module, _, attribute = name.rpartition(".")
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + f"c{module}\n{attribute}\n(U\x01xtR}}b.".encode())
    with pytest.raises(ValueError, match=f"expected a dict of weights, found {name}"):
        checkpoint.read(tmp_path / "a.pkl")


def test_a_call_of_something_else_than_a_name_is_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + b"cargparse\nNamespace\n)R(U\x01xtR.")
    with pytest.raises(ValueError, match="calls a Record"):
        checkpoint.read(tmp_path / "a.pkl")


@pytest.mark.parametrize("dicts", [dict, OrderedDict])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_old_and_new_module_pickles(tmp_path, monkeypatch, dicts, protocol):
    model = pickles.network()
    easy = pickles.stand_in(monkeypatch, "dnnlib.util", "EasyDict", type("EasyDict", (dict,), {}))
    kwargs = easy(
        skip_scale=np.float64(0.5), channel_mult=[1, 2], use_fp16=np.bool_(True), resample_filter=(1, 1), name=None
    )
    saved = {
        "ema": pickles.persistent_module(model, "EDMPrecond", kwargs, dicts=dicts),
        "augment_pipe": None,
        "dataset_kwargs": easy(path="x.zip"),
    }
    path = pickles.write(monkeypatch, tmp_path / "a.pkl", saved, protocol)
    if protocol == 2:  # names of numpy 1 and Python 2
        content = path.read_bytes()
        assert b"cnumpy._core.multiarray\n" in content
        path.write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    found = checkpoint.read(path)
    assert_equal(found.tensors, model.state_dict())
    expected = {"skip_scale": 0.5, "channel_mult": [1, 2], "use_fp16": True, "resample_filter": [1, 1], "name": None}
    assert found.arch == {"class_name": "EDMPrecond", **expected}
    assert found.meta["dataset_kwargs"] == {"path": "x.zip"}
    checkpoint.convert(path, tmp_path / "a.safetensors")
    assert_equal(checkpoint.read(tmp_path / "a.safetensors").tensors, model.state_dict())
    assert checkpoint.read(tmp_path / "a.safetensors").arch == found.arch


def test_omegaconf_values_are_unwrapped(tmp_path, monkeypatch):
    """The attributes of omegaconf 2: containers hold `_content`, leaves `_val`, all of them a link to their parent."""
    kinds = {"AnyNode": "nodes", "ListConfig": "listconfig", "DictConfig": "dictconfig"}
    any_node, list_config, dict_config = (
        pickles.stand_in(monkeypatch, f"omegaconf.{module}", name, type(name, (), {})) for name, module in kinds.items()
    )

    def make(kind, **state):
        node = kind()
        node.__dict__ = {"_metadata": None, "_parent": None, **state}
        return node

    numbers = make(list_config, _content=[make(any_node, _val=1), make(any_node, _val=np.float64(2.5))])
    for node in numbers._content:
        node._parent = numbers
    inner = make(dict_config, _content={"channel_mult": numbers, "name": make(any_node, _val="x")})
    saved = {
        "ema": pickles.persistent_module(
            pickles.network(), "IMMPrecond", {"embedding_kwargs": inner, "channel_mult": numbers}
        )
    }
    found = checkpoint.read(pickles.write(monkeypatch, tmp_path / "a.pkl", saved))
    assert found.arch == {
        "class_name": "IMMPrecond",
        "embedding_kwargs": {"channel_mult": [1, 2.5], "name": "x"},
        "channel_mult": [1, 2.5],
    }
    assert found.family == "imm"


def test_what_has_no_plain_form_stays_visible():
    assert plain({"f": Record("timm.layers.format.Format", ("NCHW",)), 1: (2, {3})}) == {
        "f": "<timm.layers.format.Format>",
        "1": [2, [3]],
    }


def test_positional_constructor_arguments_are_not_dropped_silently(tmp_path, monkeypatch):
    saved = {"ema": pickles.persistent_module(pickles.network(), "EDMPrecond", {})}
    saved["ema"].meta["state"]["_init_args"] = (32, 3)
    with pytest.raises(ValueError, match=r"built with positional arguments \[32, 3\]"):
        checkpoint.read(pickles.write(monkeypatch, tmp_path / "a.pkl", saved))


def test_a_pickle_without_ema_says_what_it_holds(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no weights found: .* it holds note \(str\), args \(argparse.Namespace\)"):
        checkpoint.read(pickles.write(monkeypatch, tmp_path / "a.pkl", {"note": "x", "args": argparse.Namespace(a=1)}))


def test_parameters_shared_by_two_modules_stay_tied(tmp_path, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    found = checkpoint.read(
        pickles.write(monkeypatch, tmp_path / "a.pkl", {"ema": pickles.persistent_module(model, "EDMPrecond", {})})
    )
    assert found.tensors.aliases == {"1.weight": "0.weight"}


BIG = 2**50


def claim_in_pickle(path, monkeypatch):
    saved = {"ema": pickles.persistent_module(pickles.network(), "EDMPrecond", {})}
    content = pickles.write(monkeypatch, path, saved, 2).read_bytes()
    shape = struct.pack(
        "<BBBBBB", 0x4B, 4, 0x4B, 3, 0x4B, 3
    )  # BININT1 4, 3, 3: the convolution's shape is (4, 3, 3, 3)
    assert content.count(shape) == 1
    path.write_bytes(content.replace(shape, b"\x8a\x07" + BIG.to_bytes(7, "little") + shape[2:]))


def claim_in_zip(path, monkeypatch, claimed=BIG):
    torch.save({"w": torch.zeros(1234)}, path)
    content = path.read_bytes()
    number = b"M" + struct.pack("<H", 1234)  # BININT2, the storage's and the tensor's number of elements
    assert content.count(number) == 2
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(
                name,
                data.replace(number, b"\x8a\x07" + claimed.to_bytes(7, "little"))
                if name.endswith("data.pkl")
                else data,
            )


def claim_in_zip_directory(path, monkeypatch):
    """The archive's directory claims 4 GB too; the file has 1 kB."""
    claim_in_zip(path, monkeypatch, 10**9)
    content = path.read_bytes()
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    sizes = struct.pack("<II", 4 * 10**9, 4 * 10**9)
    path.write_bytes(content[: start + 20] + sizes + content[start + 28 :])


def claim_in_safetensors(path, monkeypatch):
    header = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (BIG, 4 * BIG)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))


def claim_by_repetition(path, monkeypatch):
    torch.save({"w": torch.zeros(1).expand(BIG)}, path)


def claim_of_bytes(path, monkeypatch):
    path.write_bytes(b"\x80\x04\x8e" + BIG.to_bytes(8, "little") + b"abc")


@pytest.mark.parametrize(
    "claim",
    [claim_in_pickle, claim_in_zip, claim_in_zip_directory, claim_in_safetensors, claim_by_repetition, claim_of_bytes],
)
def test_a_claim_of_a_petabyte_is_refused_before_it_is_allocated(tmp_path, monkeypatch, claim):
    claim(tmp_path / "a", monkeypatch)
    with pytest.raises(ValueError, match=r"/a: .*(claims|wants) \d{10,}"):
        checkpoint.read(tmp_path / "a")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("kind", ["a.pkl", "a.pth", "old.pth", "a.safetensors"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, monkeypatch, kind, share):
    path = tmp_path / kind
    model = torch.nn.Linear(64, 64)
    if kind == "a.pkl":
        pickles.write(monkeypatch, path, {"ema": pickles.persistent_module(model, "EDMPrecond", {})})
    elif kind == "a.safetensors":
        checkpoint.write(path, model.state_dict(), metadata={})
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "a.pth")
    checkpoint.read(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"{kind}: "):
        checkpoint.read(path)


@pytest.mark.parametrize("kind", ["a.pkl", "a.pth", "old.pth", "a.safetensors"])
def test_random_damage_never_gives_another_kind_of_error(tmp_path, kind):
    path = tmp_path / kind
    if kind == "a.pkl":
        path.write_bytes(GOOD[0].read_bytes())
    elif kind == "a.safetensors":
        checkpoint.write(path, torch.nn.Linear(4, 4).state_dict(), metadata={"family": "edm"})
    else:
        saved = {"model_ema": torch.nn.Linear(4, 4).state_dict(), "args": argparse.Namespace(lr=1)}
        torch.save(saved, path, _use_new_zipfile_serialization=kind == "a.pth")
    content = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(30 if kind == "a.pkl" else 300):
        damaged = content.copy()
        damaged[rng.integers(0, min(3000, len(content)), size=3)] = rng.integers(0, 256, size=3)
        path.write_bytes(damaged.tobytes())
        try:
            describe(path)
            for value in checkpoint.read(path, weights="ema").tensors.values():
                assert value.numel() < 1e6
        except ValueError as error:
            assert kind in str(error)  # noqa: PT017 - damage that hits no structure may also pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!DOCTYPE html><html><head><title>404</title>", "HTML page.*fetch it again"),
        (b"<HTML>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "Git LFS pointer"),
        (b"", "empty"),
        (b"hello world", "not a checkpoint of a known format"),
        (b'{"a": 1}', "no weight_map"),
        (b"PK\x03\x04 rubbish", "truncated"),
    ],
)
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_files_that_are_something_else_say_so(tmp_path, content, message, suffix):
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\{suffix}: .*{message}"):
        checkpoint.read(tmp_path / f"a{suffix}")


def test_other_zip_files_and_missing_ones(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"ref\.npz: expected what torch\.save writes, found an archive of mu\.npy"):
        checkpoint.read(tmp_path / "ref.npz")
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "script.pt"))
    with pytest.raises(ValueError, match="TorchScript"):
        checkpoint.read(tmp_path / "script.pt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.read(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        checkpoint.read(tmp_path)
