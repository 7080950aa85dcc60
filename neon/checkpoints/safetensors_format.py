"""Safetensors in and out, tensor by tensor: files larger than memory can be merged.

Format: 8 bytes header length, a JSON header {name: {dtype, shape, data_offsets}, "__metadata__": {text: text}}, the
data. Tensors that were one when saved are stored once; the metadata names the others, as `safetensors.torch.save_model`
does.

Our own reader and writer: the library's `safe_open` maps the whole file, so that what was read counts as our memory,
and it tells no offsets, so that a tensor cannot be read in pieces; its writer wants all tensors at once. `safe_open`
checks what was written (`read_back`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from neon.checkpoints.lazy import Source, Storage, StoredTensor, StoredTensors
from neon.checkpoints.limits import MAX_JSON_BYTES, MAX_JSON_VALUES, clean, first_of, natural, shape_of, shown
from neon.store import files

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(source: Source) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """(entries, metadata) of a file. Raises ValueError if header and size do not fit each other."""
    header, start = read_header(source)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is not a mapping of texts")
    entries = {name: locate(source, start, name, entry) for name, entry in header.items()}
    spans = sorted((entry.storage.offset, entry.storage.num_bytes) for entry in entries.values())
    ends = [start, *(begin + length for begin, length in spans)]
    for end, begin in zip(ends, [*(begin for begin, _ in spans), source.size], strict=True):
        if end != begin:
            what = "its tensors overlap" if begin < end else "bytes of it belong to no tensor"
            raise ValueError(f"{what} (at {min(begin, end)}): damaged, or its header belongs to another file")
    for alias, kept in metadata.items():
        if kept in entries and alias not in entries:
            entries[alias] = entries[kept]
    return entries, metadata


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with these is one: a length that the file can hold, then a `{`."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= max(size, MAX_JSON_BYTES)


def read_header(source: Source) -> tuple[dict, int]:
    with source.open() as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(source.size - 8, MAX_JSON_BYTES):
            raise ValueError(
                f"its header claims {length} bytes of a file of {source.size}: truncated, or no safetensors file"
            )
        return read_json(file.read(length), "its header"), 8 + length


def read_json(text: bytes, what: str) -> dict:
    """A JSON object. Raises ValueError if it is none, holds too much, or names a thing twice."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name comes twice")
        return entries

    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ValueError(f"{what} holds more than {MAX_JSON_VALUES:,} values: refused as hostile")
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({clean(str(error), 200)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    return value


def locate(source: Source, start: int, name: str, entry: object) -> StoredTensor:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or not keys <= entry.keys() or not isinstance(entry["data_offsets"], list):
        raise ValueError(f"{shown(name)}: its header entry is {shown(entry)}, expected dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{shown(name)} has dtype {shown(entry['dtype'])}; supported are {', '.join(DTYPES)}")
    shape = shape_of(entry["shape"])
    offsets = [natural(offset, "an offset") for offset in entry["data_offsets"]]
    begin, end = offsets if len(offsets) == 2 else (1, 0)
    num_elements = math.prod(shape)
    if not (begin <= end <= source.size - start and end - begin == num_elements * dtype.itemsize):
        raise ValueError(
            f"{shown(name)}: {shown(shape)} {entry['dtype']} claims {num_elements * dtype.itemsize} bytes at "
            f"{begin}..{end}, the file has {source.size - start} bytes of data: truncated, damaged or hostile; nothing "
            "was allocated"
        )
    return StoredTensor(Storage(source, dtype, num_elements, start + begin), 0, shape, contiguous_stride(shape))


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    if 0 in shape:
        return (0,) * len(shape)  # the sizes beside a 0 may be anything
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def write_safetensors(
    path: Path, specs: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]], *, metadata: Mapping[str, str]
) -> None:
    """Write `values` in any order, holding one at a time.

    specs: name -> tensor of the final shape and dtype, in the order of the file (real or on the meta device);
        `StoredTensors` and tensors that share memory keep their aliasing.
    Raises ValueError if a value is missing, comes twice, or differs from its spec. `path` is replaced at the end, in
    one step, after the new file was read back.
    """
    aliases = aliases_of(specs)
    kept = {name: spec for name, spec in metas(specs).items() if name not in aliases}
    check_metadata(path, specs, metadata)
    offsets = lay_out(kept)
    header = encode_header(kept, offsets, {**metadata, **aliases})
    written: set[str] = set()
    with files.replacing(path) as file:
        file.write(header)
        for name, value in values:
            if name in aliases:
                continue
            spec = kept.get(name)
            if spec is None or name in written or value.shape != spec.shape or value.dtype != spec.dtype:
                expected = (
                    "nothing of that name"
                    if spec is None
                    else "one"
                    if name in written
                    else f"{tuple(spec.shape)} {spec.dtype}"
                )
                raise ValueError(
                    f"writing {path}: {shown(name)} is {tuple(value.shape)} {value.dtype}, announced was {expected}"
                )
            file.seek(len(header) + offsets[name])
            file.write(raw_bytes(value))
            written.add(name)
            del value  # before the next one is made
        missing = [name for name in kept if name not in written]
        if missing:
            raise ValueError(
                f"writing {path}: {len(missing)} of {len(kept)} tensors did not come; first: {first_of(missing)}"
            )
        file.flush()
        read_back(Path(file.name), kept)


def check_metadata(path: Path, specs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    clash = [name for name in specs if name in metadata or name == "__metadata__"]
    if clash:
        raise ValueError(f"writing {path}: {shown(clash[0])} names both a tensor and metadata")


def read_back(path: Path, specs: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the safetensors library and our reader find these tensors in a file just written."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            library = set(file.keys())
        entries, _ = read_safetensors(Source.of(path))
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"what was written cannot be read again ({error}); the old file was kept") from error
    found = {name: entry.meta for name, entry in entries.items() if name in specs}
    different = [
        name
        for name, spec in specs.items()
        if name not in library or found[name].shape != spec.shape or found[name].dtype != spec.dtype
    ]
    if different:
        raise ValueError(f"what was written reads differently ({first_of(different)}); the old file was kept")


def metas(specs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return specs.meta if isinstance(specs, StoredTensors) else specs


def aliases_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """later name -> first name of entries that are the same memory."""
    if isinstance(tensors, StoredTensors):
        return tensors.aliases
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for name, tensor in tensors.items():
        if not tensor.is_meta and tensor.numel():
            same = first.setdefault(
                (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()), name
            )
            if same != name:
                found[name] = same
    return found


def lay_out(specs: Mapping[str, Tensor]) -> dict[str, int]:
    """name -> offset in the data. Wide elements come first, so every tensor is aligned to its element size."""
    offsets, position = {}, 0
    for name in sorted(specs, key=lambda name: -specs[name].itemsize):
        offsets[name] = position
        position += specs[name].numel() * specs[name].itemsize
    return offsets


def encode_header(
    specs: Mapping[str, Tensor], offsets: Mapping[str, int], metadata: Mapping[str, str], at_least: int = 0
) -> bytes:
    """The bytes before the data: a length, and JSON padded to a multiple of 8, and to `at_least` bytes in all."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, spec in specs.items():
        if spec.dtype not in DTYPE_NAMES:
            raise ValueError(f"{shown(name)}: safetensors cannot hold {spec.dtype}")
        end = offsets[name] + spec.numel() * spec.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(max(len(text) + -len(text) % 8, at_least - 8))
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    if flat.numel() == 1:
        flat = flat.clone(memory_format=torch.contiguous_format).as_strided((1,), (1,))  # torch may keep a stride > 1
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
