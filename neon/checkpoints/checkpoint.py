"""Weights in, from every layout in use; weights out, as safetensors. No code of a file ever runs.

checkpoint = read("edm-cifar10-32x32-cond-vp.pkl")     # .arch, .family, .sha256
checkpoint.load_into(model)                            # strict
write("ours.safetensors", model.state_dict(), metadata={"family": "edm", "arch": checkpoint.arch, "weights": "ema"})
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from neon.checkpoints import weight_sets
from neon.checkpoints.lazy import Source, StoredTensors
from neon.checkpoints.safetensors_format import metas, write_safetensors
from neon.checkpoints.weight_sets import UNNAMED, Contents
from neon.store import files

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Checkpoint:
    """One weight set of a file.

    tensors: name -> tensor, read from the file at each access; names carry no `module.` or `_orig_mod.`.
    arch: constructor arguments where the file has them (pickles add `class_name`).
    weights: "ema", "raw" or what our own files say; "unnamed" if the file holds one set and does not say which.
    meta: our own metadata, or what else the file says about itself.
    shards: the files that an index names.
    """

    tensors: Mapping[str, Tensor]
    arch: dict | None
    family: str | None
    weights: str
    path: Path
    meta: dict = field(default_factory=dict)
    shards: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Of the file; of an index, over the hashes of its shards in the order of their names."""
        return content_hash(self.path, self.shards)

    @property
    def specs(self) -> Mapping[str, Tensor]:
        """name -> shape and dtype, as tensors on the meta device where nothing was read yet."""
        return metas(self.tensors)

    def load_into(self, model: nn.Module) -> None:
        """Give `model` these weights, strictly, tensor by tensor (its memory plus one tensor; a model on the meta
        device works).

        Names are those of `model.state_dict()`, its hooks included; hooks of load_state_dict do not run. Floats are
        cast to the model's dtype; an integer buffer may be stored as floats, and the other way round, if every value
        survives.
        Raises ValueError, in one line, if names, shapes or values do not fit.
        """
        targets = model.state_dict(keep_vars=True)
        self._check_fits(targets, type(model).__name__)
        for name, target in targets.items():
            value = self._fitted(name, self.tensors[name], target)
            if not isinstance(self.tensors, StoredTensors):
                value = value.clone()  # the caller's tensors stay the caller's
            if target.is_meta:
                new = (
                    nn.Parameter(value, requires_grad=target.requires_grad)
                    if isinstance(target, nn.Parameter)
                    else value
                )
                torch.utils.swap_tensors(target, new)
            else:
                target.data = value.to(
                    target.device
                )  # frees the old memory at once: the peak is the model and one tensor

    def _fitted(self, name: str, value: Tensor, target: Tensor) -> Tensor:
        cast = value.to(target.dtype)
        both_float = value.is_floating_point() and target.is_floating_point()
        if not both_float and not torch.equal(cast.to(value.dtype), value):
            raise ValueError(
                f"{self.path}: {name} is stored as {value.dtype} with values that {target.dtype} cannot hold"
            )
        return cast.contiguous()

    def _check_fits(self, targets: Mapping[str, Tensor], expected: str) -> None:
        specs = self.specs
        missing = [name for name in targets if name not in specs]
        unexpected = [name for name in specs if name not in targets]
        misshapen = [
            f"{name} {tuple(specs[name].shape)} instead of {tuple(target.shape)}"
            for name, target in targets.items()
            if name in specs and specs[name].shape != target.shape
        ]
        if missing or unexpected or misshapen:
            raise ValueError(
                f"{self.path} does not fit: expected {expected} {size_of(targets)}, the file looks like "
                f"{weight_sets.looks_like(specs)[1]} {size_of(specs)}; {len(missing)} missing, {len(unexpected)} "
                "unexpected, "
                f"{len(misshapen)} of another shape; first: "
                f"{', '.join([*misshapen[:3], *missing[:3], *unexpected[:3]][:3])}. "
                "Name the file that belongs to this model, or the model that belongs to this file"
            )


def read(path: str | Path, *, weights: str = "ema") -> Checkpoint:
    """Open a checkpoint of any layout; tensors stay in the file until they are asked for.

    weights: "ema" or "raw" (or the name that our own file gives its set); "any" takes the only set of a file,
        whatever it is. A file with one set that does not say which it is (a bare state dict) answers to every name.
    Raises FileNotFoundError, or ValueError naming the file: not a checkpoint, damaged, refused, or without that weight
    set.
    """
    path = Path(path)
    contents = open_checked(path)
    label = choose(contents, weights, path)
    found = contents.sets[label]
    entries, stripped = weight_sets.without_prefixes(found.entries)
    if stripped:
        log.warning("%s: dropped the prefix %s of its names", path, "".join(stripped))
    family = found.family or weight_sets.looks_like(entries)[0]
    return Checkpoint(StoredTensors(entries), found.arch, family, label, path, found.meta, found.shards)


def open_checked(path: Path) -> Contents:
    source = Source.of(path)
    try:
        return weight_sets.open_file(source)
    except (ValueError, RecursionError) as error:  # a container that contains itself
        raise ValueError(f"{path}: {error}") from error


def choose(contents: Contents, weights: str, path: Path) -> str:
    labels = list(contents.sets)
    if weights in labels:
        return weights
    if labels == [UNNAMED] or (weights == "any" and len(labels) == 1):
        return labels[0]
    there = ", ".join(f"{label!r} (under {found.where})" for label, found in contents.sets.items())
    raise ValueError(f"{path} holds no {weights!r} weights; it holds {there}. Ask for one of these with weights = ...")


def write(path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, object]) -> None:
    """Write safetensors, tensor by tensor, in one step. Tied tensors stay tied.

    metadata: family, arch, weights, w, base_sha256, synth_sha256, autoencoder_sha256, uint8, as far as they apply.
    """
    write_streaming(path, tensors, tensors.items(), metadata=metadata)


def write_streaming(
    path: str | Path,
    specs: Mapping[str, Tensor],
    values: Iterable[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, object],
) -> None:
    """`write` for tensors that are still to be made: `specs` (say, a checkpoint's `tensors`) gives names, shapes,
    dtypes, ties."""
    write_safetensors(Path(path), specs, values, metadata={"neon": json.dumps({"format": 1, **metadata})})


def convert(source: str | Path, target: str | Path, *, weights: str = "ema") -> Checkpoint:
    """Write one weight set of any checkpoint as safetensors; what the file says about itself goes into the metadata."""
    checkpoint = read(source, weights=weights)
    metadata = {
        **checkpoint.meta,
        "family": checkpoint.family,
        "arch": checkpoint.arch,
        "source_sha256": checkpoint.sha256,
    }
    write(
        target,
        checkpoint.tensors,
        metadata=metadata | ({} if checkpoint.weights == UNNAMED else {"weights": checkpoint.weights}),
    )
    return read(target, weights="any")


def content_hash(path: Path, shards: Iterable[str]) -> str:
    hashes = [files.sha256_of(path.with_name(shard)) for shard in shards]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest() if hashes else files.sha256_of(path)


def size_of(specs: Mapping[str, Tensor]) -> str:
    """'(28 blocks, 676,700,000 numbers in 296 tensors)': what tells one size of a network from another."""
    lists: dict[str, list[int]] = {}
    for name in specs:
        numbered = re.search(r"([^.]+)\.(\d+)\.", name)
        if numbered:
            lists.setdefault(numbered[1], []).append(int(numbered[2]))
    main = max(lists, key=lambda key: len(lists[key]), default=None)  # the list with the most tensors
    depth = f"{max(lists[main]) + 1} {main}, " if main else ""
    return f"({depth}{sum(spec.numel() for spec in specs.values()):,} numbers in {len(specs)} tensors)"
