"""The three ways in which PyTorch weights are pickled, read by `neon.checkpoints.inert_pickle`; every tensor stays in
its file.

* torch.save today: a zip archive with one pickle and one record per storage.
* torch.save before 1.6: five pickles and the storages in one stream.
* module pickles of EDM and IMM: a plain pickle of `torch_utils.persistence` objects, each storage embedded as bytes in
  the older torch.save format; the modules' source text, which NVIDIA's loader executes, is ignored.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import numpy as np
import torch

from fid.files import member_offset
from neon.checkpoints.bounded import Bounded, Span
from neon.checkpoints.inert_pickle import Global, Machine, Rebuilder, Record, checked_keys, set_of
from neon.checkpoints.lazy import Checksum, Readable, Source, Storage, StoredTensor, window
from neon.checkpoints.limits import Budget, clean, first_of, natural, shape_of, shown

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_DEPTH = 100
MAX_MODULES = 1_000_000
MAX_PICKLE_BYTES = 128 << 20  # of the table of contents in an archive: 300,000 tensors have 40 MB
MAX_PLAIN_NODES = 100_000  # of constructor arguments and options, as they unfold
NO_DIRECTORY = (zipfile.BadZipFile, NotImplementedError, ValueError)
"""What zipfile raises; the second is its word for "made by a newer zip", the third for a name that is no text."""

STORAGE_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip


def read_zip(source: Source, start: int = 0, size: int | None = None) -> object:
    """The value that torch.save wrote to a zip archive (`size` bytes from `start` on; the whole file by default).

    Raises ValueError for a damaged file or one of another kind.
    """
    with source.open() as whole:
        file = window(whole, start, source.size - start if size is None else size)
        try:
            members = {info.filename.partition("/")[2]: info for info in zipfile.ZipFile(file).infolist()}
        except NO_DIRECTORY as error:
            raise ValueError(
                f"the zip archive has no readable directory ({clean(str(error), 100)}): truncated, copy or download it "
                "again"
            ) from error
        if "data.pkl" not in members or "constants.pkl" in members:
            names = first_of(info.filename for info in members.values())
            what = "a TorchScript program" if "constants.pkl" in members else f"an archive of {names}"
            raise ValueError(f"expected what torch.save writes, found {what}")
        if "byteorder" in members and read_record(file, members["byteorder"], 16) != b"little":
            raise ValueError("it was written on a big-endian machine")
        storages: dict[str, Storage] = {}

        def storage(identity: object) -> Storage:
            dtype, key, num_elements = storage_type(identity)
            if key not in storages:
                info = members[f"data/{key}"]
                offset, num_bytes = locate_record(file, info)
                if num_elements * dtype.itemsize > min(num_bytes, source.size - start - offset):
                    raise ValueError(
                        f"storage {shown(key)} claims {num_elements * dtype.itemsize} bytes, its record has {num_bytes}"
                    )
                checksum = Checksum(info.filename, num_bytes, info.CRC) if info.CRC else None
                storages[key] = Storage(source, dtype, num_elements, start + offset, checksum)
            return storages[key]

        content = Bounded(io.BytesIO(read_record(file, members["data.pkl"], MAX_PICKLE_BYTES)))
        return Machine(content, rebuilders(content, source), storage).load()


def read_record(file: Readable, info: zipfile.ZipInfo, limit: int) -> bytes:
    offset, num_bytes = locate_record(file, info)
    if num_bytes > limit:
        raise ValueError(
            f"its record {shown(info.filename)} claims {num_bytes} bytes: refused, at most {limit} are read"
        )
    bounded = Bounded(file)
    bounded.seek(offset)
    content = bounded.read(num_bytes)
    if info.CRC:
        Checksum(info.filename, num_bytes, info.CRC).compare(zlib.crc32(content), "the archive")
    return content


def locate_record(file: Readable, info: zipfile.ZipInfo) -> tuple[int, int]:
    """(offset, size) of a record's bytes. A CRC-32 of 0 is none: torch.serialization.set_crc32_options(False)."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{shown(info.filename)} is compressed; torch.save stores its records as they are")
    return member_offset(file, info), info.file_size


def read_pickle(source: Source) -> object:
    """The value of a plain pickle, or of torch.save's older format."""
    with source.open() as file:
        content = Bounded(file)
        first = Machine(content, rebuilders(content, source)).load()
        return read_legacy(content, source, 0) if first == LEGACY_MAGIC else first


def read_legacy(content: Bounded, source: Source | bytes, start: int) -> object:
    """torch.save's older format, after its magic number; its storages lie `start` bytes further on in `source`."""
    storages: dict[str, Storage] = {}

    def storage(identity: object) -> Storage:
        dtype, key, num_elements = storage_type(identity)
        if isinstance(identity, tuple) and len(identity) > 5 and identity[5] is not None:
            raise ValueError(
                "it was written by torch < 0.4 (views of storages); load and save it with torch >= 1.0 first"
            )
        return storages.setdefault(key, Storage(source, dtype, num_elements))

    tables = rebuilders(content, source)
    protocol, system = (Machine(content, tables).load() for _ in range(2))
    if protocol != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError(f"unknown version of torch.save's older format ({shown(protocol)})")
    value = Machine(content, tables, storage).load()
    keys = Machine(content, tables).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != storages.keys():
        raise ValueError("the list of storages does not belong to the tensors")
    for key in keys:
        num_elements = int.from_bytes(content.read(8), "little", signed=True)
        if num_elements != storages[key].num_elements:
            raise ValueError(
                f"storage {shown(key)} has {num_elements} elements, announced were {storages[key].num_elements}"
            )
        storages[key].offset = start + content.tell()
        num_bytes = num_elements * storages[key].dtype.itemsize
        if num_bytes > content.size - content.tell():
            raise ValueError(
                f"storage {shown(key)} claims {num_bytes} bytes, the file has {content.size - content.tell()} left: "
                "truncated or damaged"
            )
        content.seek(content.tell() + num_bytes)
    return value


def storage_type(identity: object) -> tuple[torch.dtype, str, int]:
    """(dtype, key, number of elements) of ('storage', type, key, location, number, ...); 'Untyped' ones are bytes."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise ValueError(f"expected a reference to a storage, found {shown(identity)}")
    kind, key, number = identity[1], identity[2], natural(identity[4], "the number of elements of a storage")
    name = kind.name.rpartition(".")[2].removesuffix("Storage") if isinstance(kind, Global) else ""
    if name not in STORAGE_DTYPES or not isinstance(key, str):
        raise ValueError(f"a storage of type {shown(name)} called {shown(key)} is not supported")
    return STORAGE_DTYPES[name], key, number


def rebuilders(content: Bounded, source: Source | bytes) -> dict[str, Rebuilder]:
    """What stands for the calls that checkpoints contain."""

    def load_from_bytes(value: object) -> object:
        nested = content.part(value)
        if Machine(nested, {}).load() != LEGACY_MAGIC:
            raise ValueError("an embedded tensor is not in torch.save's older format")
        at = (source, value.offset) if isinstance(value, Span) else (content.bytes_of(value), 0)
        return read_legacy(nested, *at)

    def scalar(dtype: object, value: object) -> object:
        if isinstance(value, Span) and value.length > 32:
            raise ValueError(f"a numpy scalar of {value.length} bytes")
        return numpy_scalar(dtype, content.bytes_of(value))

    table: dict[str, Rebuilder] = {
        "collections.OrderedDict": dict_of,
        "collections.defaultdict": lambda factory=None, pairs=(): dict_of(pairs),
        "_codecs.encode": lambda text, encoding="latin1": text.encode("latin1"),
        "torch.Size": tuple,
        "torch.storage._load_from_bytes": load_from_bytes,
        "torch._utils._rebuild_tensor": rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_tensor_v3": rebuild_untyped,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch_utils.persistence._reconstruct_persistent_obj": persistent_object,
    }
    for builtins in ("builtins", "__builtin__"):
        table |= {f"{builtins}.{kind.__name__}": kind for kind in (list, tuple)}
        table |= {f"{builtins}.dict": dict_of, f"{builtins}.set": set_of, f"{builtins}.frozenset": set_of}
    for multiarray in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table[f"{multiarray}.scalar"] = scalar
    return table


def dict_of(pairs: object = ()) -> dict:
    entries = list(pairs.items()) if isinstance(pairs, Mapping) else list(cast("Iterable[tuple]", pairs))
    checked_keys(key for key, _ in entries)
    return dict(entries)


def rebuild_tensor(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    grad: object = None,
    hooks: object = None,
    views: object = None,
    *_: object,
) -> StoredTensor:
    """torch._utils._rebuild_tensor(_v2). views: {"conj": True} of a conjugate, {"neg": True} of a negative view."""
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor without a storage ({shown(storage)})")
    marks = views if isinstance(views, dict) else {}
    if not marks.keys() <= {"conj", "neg"}:
        raise ValueError(f"a tensor with properties that are not known here: {first_of(map(str, marks))}")
    is_conj, is_neg = marks.get("conj") is True, marks.get("neg") is True
    return StoredTensor(storage, natural(offset, "an offset"), shape_of(shape), shape_of(stride), is_conj, is_neg)


def rebuild_untyped(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    grad: object,
    hooks: object,
    dtype: object,
    *_: object,
) -> StoredTensor:
    """torch._utils._rebuild_tensor_v3: a storage of bytes and a dtype."""
    wanted = getattr(torch, dtype.name.removeprefix("torch."), None) if isinstance(dtype, Global) else None
    if not isinstance(wanted, torch.dtype) or not isinstance(storage, Storage):
        raise ValueError(f"a tensor of unknown dtype {shown(dtype)}")
    typed = Storage(storage.source, wanted, storage.num_elements // wanted.itemsize, storage.offset, storage.checksum)
    return rebuild_tensor(typed, offset, shape, stride, grad, hooks, *_)


def persistent_object(meta: object) -> Record:
    """An object of NVIDIA's `torch_utils.persistence`: class name and state; its source text is left alone."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise ValueError("a persistent object without a class name")
    return Record(meta["class_name"], state=meta.get("state"))


def numpy_scalar(dtype: object, raw: bytes) -> object:
    """numpy's scalar(dtype, bytes) as a Python number."""
    code = dtype.args[0] if isinstance(dtype, Record) and dtype.name == "numpy.dtype" and dtype.args else None
    order = dtype.state[1] if isinstance(dtype, Record) and isinstance(dtype.state, tuple) else "<"
    if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code) or order not in ("<", ">", "|", "="):
        raise ValueError(f"a numpy scalar of type {code!r} and byte order {order!r}")
    return np.frombuffer(raw, np.dtype(order + code))[0].item()


def state_dict_of(
    module: object, prefix: str = "", depth: int = 0, budget: Budget | None = None
) -> Iterator[tuple[str, StoredTensor]]:
    """state_dict() of a pickled module: own parameters, own persistent buffers, then the children."""
    budget = budget or Budget(MAX_MODULES, "modules and tensors")
    state = module.state if isinstance(module, Record) else None
    tables = (
        [state.get(name) for name in ("_parameters", "_buffers", "_modules")] if isinstance(state, dict) else [None]
    )
    if not isinstance(state, dict) or not all(isinstance(table, dict) for table in tables) or depth > MAX_DEPTH:
        raise ValueError(f"{shown(prefix) or 'the model'} is not a pickled module")
    transient = state.get("_non_persistent_buffers_set") or ()
    if not isinstance(transient, (set, frozenset, tuple, list)):
        raise ValueError(f"{shown(prefix) or 'the model'} is not a pickled module")
    buffers = {name: value for name, value in state["_buffers"].items() if name not in transient}
    budget.spend(1 + len(state["_parameters"]) + len(buffers))
    for name, value in (state["_parameters"] | buffers).items():
        if isinstance(value, StoredTensor):
            yield f"{prefix}{name}", value
        elif value is not None:
            raise ValueError(f"{shown(prefix)}{shown(name)} is {shown(value)}, expected a tensor")
    for name, child in state["_modules"].items():
        if child is not None:
            yield from state_dict_of(child, f"{prefix}{name}.", depth + 1, budget)


def plain(value: object, budget: Budget | None = None, depth: int = 0) -> object:
    """Configuration values as JSON-like data: omegaconf, EasyDict and Namespace unwrapped, tuples as lists.

    What has no such form (an enum of timm, say) becomes the text <name>. Raises ValueError if the values unfold to
    more than any configuration: they may hold each other.
    """
    budget = budget or Budget(MAX_PLAIN_NODES, "values of a configuration")
    budget.spend()
    if depth > MAX_DEPTH:
        raise ValueError(f"values of a configuration are nested deeper than {MAX_DEPTH}: refused as hostile")
    if isinstance(value, Record):
        state = value.state if isinstance(value.state, Mapping) else {}
        for wrapped in ("_content", "_val"):  # omegaconf's containers and leaves
            if wrapped in state:
                return plain(state[wrapped], budget, depth + 1)
        if value.name in ("dnnlib.util.EasyDict", "argparse.Namespace"):
            return plain(value.items or state, budget, depth + 1)
        return f"<{shown(value.name)}>"
    if isinstance(value, Global):
        return value.name
    if isinstance(value, Mapping):
        return {key_text(key, budget): plain(inner, budget, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner, budget, depth + 1) for inner in value]
    if isinstance(value, str):
        budget.spend(len(value) // 1000)
        return value
    if isinstance(value, int) and value.bit_length() > 64:
        return f"<{shown(value)}>"
    return value if isinstance(value, (int, float, bool, type(None))) else f"<{type(value).__name__}>"


def key_text(key: object, budget: Budget) -> str:
    text = str(key) if isinstance(key, (str, int, float, bool, type(None))) else f"<{shown(key)}>"
    budget.spend(len(text) // 1000)
    return text
