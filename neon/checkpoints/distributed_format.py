"""Folders of torch.distributed.checkpoint (DCP): `.metadata` says which piece of which tensor lies where; every piece
is a torch.save archive of its own in the ranks' .distcp files. Read by the inert unpickler, never by torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neon.checkpoints.inert_pickle import Record
from neon.checkpoints.lazy import Source, StoredTensor
from neon.checkpoints.limits import Budget, natural, shape_of, shown
from neon.checkpoints.safetensors_format import contiguous_stride
from neon.checkpoints.torch_format import read_zip

METADATA = "torch.distributed.checkpoint.metadata.Metadata"
MAX_PIECES = 1_000_000


@dataclass(frozen=True)
class PiecedTensor(StoredTensor):
    """A tensor that ranks stored in pieces. storage: the first piece's; pieces: (where it begins, piece)."""

    pieces: tuple[tuple[tuple[int, ...], StoredTensor], ...] = ()

    def __post_init__(self) -> None:
        held = sum(math.prod(piece.shape) for _, piece in self.pieces)
        inside = all(
            len(at) == len(piece.shape) == len(self.shape)
            and all(start + size <= whole for start, size, whole in zip(at, piece.shape, self.shape, strict=True))
            and piece.storage.dtype == self.storage.dtype
            for at, piece in self.pieces
        )
        if not inside or held != math.prod(self.shape) or len({at for at, _ in self.pieces}) < len(self.pieces):
            raise ValueError(
                f"the pieces of a tensor of shape {shown(self.shape)} do not make it up: damaged or hostile"
            )

    @property
    def is_plain(self) -> bool:
        return False

    def read(self) -> Tensor:
        whole = torch.empty(self.shape, dtype=self.storage.dtype)
        for at, piece in self.pieces:
            place = tuple(slice(start, start + size) for start, size in zip(at, piece.shape, strict=True))
            whole[place] = piece.read()
        return whole


def read_distributed(source: Source, value: Record) -> tuple[dict, tuple[str, ...]]:
    """(nested dicts of tensors as they were saved, the files that hold them). source: the `.metadata` file; value: what
    is pickled in it. Raises ValueError for what is damaged or stored in a way that is not known."""
    state = fields(value)
    tables = {key: state.get(key) for key in ("state_dict_metadata", "storage_data")}
    described, located = (table if isinstance(table, dict) else {} for table in tables.values())
    budget = Budget(MAX_PIECES, "pieces of tensors")
    places: dict[str, list[tuple[tuple[int, ...], StoredTensor]]] = {}
    files: dict[str, Source] = {}
    for index, info in located.items():
        budget.spend()
        key = fields(index)
        name, at = key.get("fqn"), key.get("offset")
        about = described.get(name) if isinstance(name, str) else None
        if not isinstance(about, Record) or not about.name.endswith(".TensorStorageMetadata"):
            continue  # step counters and the like, stored as pickles
        places.setdefault(str(name), []).append((shape_of(at or ()), piece_of(fields(info), source, files)))
    nested: dict = {}
    paths = state.get("planner_data")
    for name, about in described.items():
        if name not in places or not isinstance(about, Record):
            continue
        tensor = whole_of(shape_of(fields(about).get("size")), places[name])
        put(nested, path_of(paths, name), tensor)
    return nested, tuple(sorted(files))


def fields(record: object) -> dict:
    if not isinstance(record, Record) or not isinstance(record.state, dict):
        raise ValueError(f"expected a record of a distributed checkpoint, found {shown(record)}")
    return record.state


def piece_of(info: Mapping, source: Source, files: dict[str, Source]) -> StoredTensor:
    name = info.get("relative_path")
    if not isinstance(name, str) or "/" in name or "\\" in name or "\0" in name or name.startswith("."):
        raise ValueError(f"a tensor lies in {shown(name)}, which is not a plain file name")
    if info.get("transform_descriptors"):
        raise ValueError("its tensors are compressed or encrypted; save it again without extensions")
    if name not in files:
        files[name] = Source.of(source.path.with_name(name))
    offset, length = (natural(info.get(key), f"the {key} of a piece") for key in ("offset", "length"))
    if offset + length > files[name].size:
        raise ValueError(f"a piece ends at byte {offset + length} of {shown(name)}, which has {files[name].size}")
    piece = read_zip(files[name], offset, length)
    if not isinstance(piece, StoredTensor):
        raise ValueError(f"a piece in {shown(name)} is {shown(piece)}, expected a tensor")
    return piece


def whole_of(shape: tuple[int, ...], pieces: list[tuple[tuple[int, ...], StoredTensor]]) -> StoredTensor:
    if len(pieces) == 1 and pieces[0][1].shape == shape:
        return pieces[0][1]
    full = [(at if len(at) == len(shape) else (0,) * len(shape), piece) for at, piece in pieces]
    return PiecedTensor(pieces[0][1].storage, 0, shape, contiguous_stride(shape), pieces=tuple(full))


def path_of(paths: object, name: str) -> tuple[str, ...]:
    """Where a flattened name lay: ("model", "a.weight") of "model.a.weight", if the planner noted it."""
    path = paths.get(name) if isinstance(paths, dict) else None
    if isinstance(path, (tuple, list)) and path and all(isinstance(key, (str, int)) for key in path):
        return tuple(map(str, path))
    return (name,)


def put(nested: dict, path: tuple[str, ...], tensor: StoredTensor) -> None:
    for key in path[:-1]:
        nested = nested.setdefault(key, {})
        if not isinstance(nested, dict):
            raise ValueError(f"{shown(key)} names a tensor and a group of tensors")
    nested[path[-1]] = tensor


def is_distributed(value: object) -> bool:
    return isinstance(value, Record) and value.name == METADATA
