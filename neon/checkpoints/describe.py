"""What a checkpoint or statistics file is, for people: format, weight sets, sizes, hash. Nothing in it is executed."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

from fid.files import read_array_header
from neon.checkpoints import weight_sets
from neon.checkpoints.checkpoint import content_hash, open_checked
from neon.checkpoints.folders import only_entry
from neon.checkpoints.lazy import Source, StoredTensors
from neon.checkpoints.torch_format import NO_DIRECTORY
from neon.store import files


def describe(path: str | Path) -> dict[str, object]:
    """What a file (or a folder with one network) is, for people: a checkpoint's format, weight sets, arch and size, or
    the arrays of an .npz."""
    path = Path(path)
    if path.is_dir():
        path = only_entry(path)
    source = Source.of(path)
    about: dict[str, object] = {"path": str(path), "bytes": source.size}
    if is_npz(path):
        return about | {"format": "npz", "arrays": npz_arrays(path), "sha256": files.sha256_of(path)}
    contents = open_checked(path)
    count = Counter(found.label for found in contents.sets)
    sets = {
        (found.label if count[found.label] == 1 else f"/{found.where}"): describe_set(found) for found in contents.sets
    }
    shards = [shard for found in contents.sets for shard in found.shards]
    return about | {"format": contents.format, "weights": sets, "sha256": content_hash(path, shards)}


def describe_set(found: weight_sets.WeightSet) -> dict[str, object]:
    entries, stripped = weight_sets.without_prefixes(found.entries)
    specs = StoredTensors(entries).meta
    family, kind = weight_sets.looks_like(specs)
    return {
        "under": found.where,
        "family": found.family or family,
        "looks_like": kind,
        "arch": found.arch,
        "tensors": len(specs),
        "elements": sum(spec.numel() for spec in specs.values()),
        "dtypes": dict(Counter(str(spec.dtype).removeprefix("torch.") for spec in specs.values())),
        "dropped_prefixes": stripped,
        "no_tensors": list(found.dropped),
        **({"problem": found.problem} if found.problem else {}),
        "meta": found.meta,
    }


def is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except NO_DIRECTORY:
        return False


def npz_arrays(path: Path) -> dict[str, dict[str, object]]:
    """{key: {shape, dtype, value of scalars}} from the headers alone: reference files may hold gigabytes of images."""
    arrays: dict[str, dict[str, object]] = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                header = read_array_header(member)
            arrays[name.removesuffix(".npy")] = {"shape": list(header.shape), "dtype": str(header.dtype)}
    with np.load(path, allow_pickle=False) as data:
        for key, about in arrays.items():
            if about["shape"] == [] and about["dtype"] != "object":
                about["value"] = data[key].item()
    return arrays
