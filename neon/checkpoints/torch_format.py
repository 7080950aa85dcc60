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
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np
import torch

from neon.checkpoints.inert_pickle import Bounded, Global, Machine, Rebuilder, Record, Span
from neon.checkpoints.lazy import Source, Storage, StoredTensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_DEPTH = 100

STORAGE_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip


def read_zip(source: Source) -> object:
    """The value that torch.save wrote to a zip archive. Raises ValueError for a damaged file or one of another kind."""
    with source.open() as file:
        try:
            members = {info.filename.partition("/")[2]: info for info in zipfile.ZipFile(file).infolist()}
        except (
            zipfile.BadZipFile,
            NotImplementedError,
        ) as error:  # the second is zipfile's word for "made by a newer zip"
            raise ValueError(
                f"the zip archive has no readable directory ({error}): truncated, copy or download it again"
            ) from error
        if "data.pkl" not in members or "constants.pkl" in members:
            names = [info.filename for info in members.values()]
            what = "a TorchScript program" if "constants.pkl" in members else f"an archive of {', '.join(names[:3])}"
            raise ValueError(f"expected what torch.save writes, found {what}")
        if "byteorder" in members and read_record(file, members["byteorder"]) != b"little":
            raise ValueError("it was written on a big-endian machine")
        storages: dict[str, Storage] = {}

        def storage(identity: tuple) -> Storage:
            dtype, key, num_elements = storage_type(identity), str(identity[2]), int(identity[4])
            if key not in storages:
                offset, num_bytes = locate_record(file, members[f"data/{key}"])
                if num_elements * dtype.itemsize > min(num_bytes, source.size - offset):
                    raise ValueError(
                        f"storage {key} claims {num_elements * dtype.itemsize} bytes, its record has {num_bytes}"
                    )
                storages[key] = Storage(source, dtype, num_elements, offset)
            return storages[key]

        content = Bounded(io.BytesIO(read_record(file, members["data.pkl"])))
        return Machine(content, rebuilders(content, source), storage).load()


def read_record(file: BinaryIO, info: zipfile.ZipInfo) -> bytes:
    offset, num_bytes = locate_record(file, info)
    bounded = Bounded(file)
    bounded.seek(offset)
    return bounded.read(num_bytes)


def locate_record(file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    """(offset, size) of a record's bytes: its local header repeats the name and pads with an extra field."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed; torch.save stores its records as they are")
    file.seek(max(info.header_offset, 0) + 26)
    lengths = file.read(4)
    if info.header_offset < 0 or len(lengths) < 4:
        raise ValueError(f"{info.filename} lies outside of the file: truncated or damaged")
    return info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(
        lengths[2:], "little"
    ), info.file_size


def read_pickle(source: Source) -> object:
    """The value of a plain pickle, or of torch.save's older format."""
    with source.open() as file:
        content = Bounded(file)
        first = Machine(content, rebuilders(content, source)).load()
        return read_legacy(content, source, 0) if first == LEGACY_MAGIC else first


def read_legacy(content: Bounded, source: Source | bytes, start: int) -> object:
    """torch.save's older format, after its magic number; its storages lie `start` bytes further on in `source`."""
    storages: dict[str, Storage] = {}

    def storage(identity: tuple) -> Storage:
        if len(identity) > 5 and identity[5] is not None:
            raise ValueError(
                "it was written by torch < 0.4 (views of storages); load and save it with torch >= 1.0 first"
            )
        return storages.setdefault(str(identity[2]), Storage(source, storage_type(identity), int(identity[4])))

    tables = rebuilders(content, source)
    protocol, system = (Machine(content, tables).load() for _ in range(2))
    if protocol != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError(f"unknown version of torch.save's older format ({protocol}, {system})")
    value = Machine(content, tables, storage).load()
    keys = Machine(content, tables).load()
    if not isinstance(keys, list) or set(map(str, keys)) != storages.keys():
        raise ValueError("the list of storages does not belong to the tensors")
    for key in map(str, keys):
        num_elements = int.from_bytes(content.read(8), "little", signed=True)
        if num_elements != storages[key].num_elements:
            raise ValueError(f"storage {key} has {num_elements} elements, announced were {storages[key].num_elements}")
        storages[key].offset = start + content.tell()
        num_bytes = num_elements * storages[key].dtype.itemsize
        if num_bytes > content.size - content.tell():
            raise ValueError(
                f"storage {key} claims {num_bytes} bytes, the file has {content.size - content.tell()} left: "
                "truncated or damaged"
            )
        content.seek(content.tell() + num_bytes)
    return value


def storage_type(identity: tuple) -> torch.dtype:
    """dtype of ('storage', type, key, location, number of elements, ...); 'Untyped' ones are bytes."""
    if len(identity) < 5 or identity[0] != "storage" or not isinstance(identity[1], Global):
        raise ValueError(f"expected a reference to a storage, found {identity!s:.80}")
    name = identity[1].name.rpartition(".")[2].removesuffix("Storage")
    if name not in STORAGE_DTYPES or int(identity[4]) < 0:
        raise ValueError(f"storage of type {identity[1].name} with {identity[4]} elements is not supported")
    return STORAGE_DTYPES[name]


def rebuilders(content: Bounded, source: Source | bytes) -> dict[str, Rebuilder]:
    """What stands for the calls that checkpoints contain."""

    def load_from_bytes(value: object) -> object:
        embedded = content.bytes_of(value)
        nested = Bounded(io.BytesIO(embedded))
        if Machine(nested, {}).load() != LEGACY_MAGIC:
            raise ValueError("an embedded tensor is not in torch.save's older format")
        return (
            read_legacy(nested, source, value.offset) if isinstance(value, Span) else read_legacy(nested, embedded, 0)
        )

    def scalar(dtype: object, value: object) -> object:
        return numpy_scalar(dtype, content.bytes_of(value))

    table: dict[str, Rebuilder] = {
        "collections.OrderedDict": lambda pairs=(): dict(pairs),
        "collections.defaultdict": lambda factory=None, pairs=(): dict(pairs),
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
        table |= {f"{builtins}.{kind.__name__}": kind for kind in (set, frozenset, list, tuple, dict)}
    for multiarray in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table[f"{multiarray}.scalar"] = scalar
    return table


def rebuild_tensor(storage: object, offset: int, shape: tuple, stride: tuple, *_: object) -> StoredTensor:
    """torch._utils._rebuild_tensor(_v2)."""
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor without a storage ({type(storage).__name__})")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def rebuild_untyped(
    storage: object, offset: int, shape: tuple, stride: tuple, grad: bool, hooks: object, dtype: object, *_: object
) -> StoredTensor:
    """torch._utils._rebuild_tensor_v3: a storage of bytes and a dtype."""
    wanted = getattr(torch, dtype.name.removeprefix("torch."), None) if isinstance(dtype, Global) else None
    if not isinstance(wanted, torch.dtype) or not isinstance(storage, Storage):
        raise ValueError(f"a tensor of unknown dtype {dtype}")
    typed = Storage(storage.source, wanted, storage.num_elements // wanted.itemsize, storage.offset)
    return StoredTensor(typed, offset, tuple(shape), tuple(stride))


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


def state_dict_of(module: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, StoredTensor]]:
    """state_dict() of a pickled module: own parameters, own persistent buffers, then the children."""
    state = module.state if isinstance(module, Record) else None
    tables = (
        [state.get(name) for name in ("_parameters", "_buffers", "_modules")] if isinstance(state, dict) else [None]
    )
    if not isinstance(state, dict) or not all(isinstance(table, dict) for table in tables) or depth > MAX_DEPTH:
        raise ValueError(f"{prefix or 'the model'} is not a pickled module")
    transient = state.get("_non_persistent_buffers_set") or ()
    buffers = {name: value for name, value in state["_buffers"].items() if name not in transient}
    for name, value in (state["_parameters"] | buffers).items():
        if isinstance(value, StoredTensor):
            yield prefix + name, value
        elif value is not None:
            raise ValueError(f"{prefix}{name} is a {type(value).__name__}, expected a tensor")
    for name, child in state["_modules"].items():
        if child is not None:
            yield from state_dict_of(child, f"{prefix}{name}.", depth + 1)


def plain(value: object) -> object:
    """Configuration values as JSON-like data: omegaconf, EasyDict and Namespace unwrapped, tuples as lists.

    What has no such form (an enum of timm, say) becomes the text <name>.
    """
    if isinstance(value, Record):
        state = value.state if isinstance(value.state, Mapping) else {}
        for wrapped in ("_content", "_val"):  # omegaconf's containers and leaves
            if wrapped in state:
                return plain(state[wrapped])
        if value.name in ("dnnlib.util.EasyDict", "argparse.Namespace"):
            return plain(value.items or state)
        return f"<{value.name}>"
    if isinstance(value, Global):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else f"<{type(value).__name__}>"
