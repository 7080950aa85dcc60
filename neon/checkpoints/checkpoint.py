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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from neon.checkpoints import weight_sets
from neon.checkpoints.building import building
from neon.checkpoints.folders import only_entry
from neon.checkpoints.lazy import Source, StoredTensors
from neon.checkpoints.limits import clean, first_of, shown
from neon.checkpoints.safetensors_format import aliases_of, metas, write_safetensors
from neon.checkpoints.weight_sets import KNOWN, UNNAMED, Contents, WeightSet
from neon.store import files, hub, records

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
Arch = TypeVar("Arch")


@dataclass(eq=False)
class Checkpoint:
    """One weight set of a file.

    tensors: name -> tensor, read from the file at each access; names carry no `module.` or `_orig_mod.` of a wrapper
        (those of our own files are as they were written).
    arch: constructor arguments where the file has them (pickles add `class_name`).
    weights: "ema", "raw", what our own files say, or the set's place in the file; "unnamed" if the file holds one set
        and does not say which.
    meta: our own metadata, or what else the file says about itself.
    shards: the files that an index names.
    texts: metadata of a safetensors file that is not ours ({"format": "pt"} in every Hugging Face file).
    is_arch_given: arch is the caller's, not the file's.
    """

    tensors: Mapping[str, Tensor]
    arch: dict | None
    family: str | None
    weights: str
    path: Path
    meta: dict = field(default_factory=dict)
    shards: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    is_arch_given: bool = False

    @cached_property
    def sha256(self) -> str:
        """Of the file; of an index, over the hashes of its shards in the order of their names."""
        return self.hash_by(files.sha256_of)

    def hash_by(self, hash_of: Callable[[Path], str]) -> str:
        return content_hash(self.path, self.shards, hash_of)

    @property
    def files(self) -> list[Path]:
        """Every file that holds a part of it."""
        return [self.path, *(self.path.with_name(shard) for shard in self.shards)]

    @property
    def ties(self) -> Mapping[str, str]:
        """later name -> first name of entries that are one tensor."""
        return aliases_of(self.tensors)

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

    def filled(self, build: Callable[[Arch], Model], arch: Arch) -> Model:
        """The network build(arch) with these weights; its own initial values cost neither time nor memory.

        For networks whose every tensor is in the state dict: they are built on the meta device. Raises ValueError,
        naming the file, if `arch` makes no network or one that has other tensors.
        """
        with torch.device("meta"), building(self.path, arch, len(self.specs)):
            model = build(arch)
        self.load_into(model)
        return model

    def _fitted(self, name: str, value: Tensor, target: Tensor) -> Tensor:
        cast = value.to(target.dtype)
        both_float = value.is_floating_point() and target.is_floating_point()
        if not both_float and not torch.equal(cast.to(value.dtype), value):
            raise ValueError(
                f"{self.path}: {shown(name)} is stored as {value.dtype} with values that {target.dtype} cannot hold"
            )
        return cast.contiguous()

    def _check_fits(self, targets: Mapping[str, Tensor], expected: str) -> None:
        specs = self.specs
        missing = [name for name in targets if name not in specs]
        unexpected = [name for name in specs if name not in targets]
        misshapen = [
            f"{shown(name)} {tuple(specs[name].shape)} instead of {tuple(target.shape)}"
            for name, target in targets.items()
            if name in specs and specs[name].shape != target.shape
        ]
        if missing or unexpected or misshapen:
            raise ValueError(
                f"{self.path} does not fit: expected {expected} {size_of(targets)}, the file looks like "
                f"{weight_sets.looks_like(specs)[1]} {size_of(specs)}; {len(missing)} missing, {len(unexpected)} "
                "unexpected, "
                f"{len(misshapen)} of another shape; first: "
                f"{first_of([*misshapen[:3], *missing[:3], *unexpected[:3]])}. "
                "Name the file that belongs to this model, or the model that belongs to this file"
            )


def read(path: str | Path, *, weights: str = "ema", option: str = "weights = ...") -> Checkpoint:
    """Open a checkpoint of any layout, or a folder with one; tensors stay in the file until they are asked for.

    weights: "ema" or "raw"; the name that our own file gives its set; or the place of any set ("params_ema",
        "trainer/vae_local"; "/ema" where that is no label). "any" takes the only set of a file, whatever it is, "auto"
        the average if there is one and the only set otherwise. A file with one set that does not say which it is (a
        bare state dict) answers to every name.
    option: what the caller's user would write to name another set, for the message.
    Raises FileNotFoundError, or ValueError naming the file: not a checkpoint, damaged, refused, or without that weight
    set.
    """
    path = hub.local(path)
    if path.is_dir():
        path = only_entry(path)
    found = choose(open_checked(path), weights, path, option)
    if found.problem:
        raise ValueError(f"{path}: its {found.label!r} weights ({found.where}) cannot be used: {found.problem}")
    if found.dropped:
        log.warning(
            "%s: %d entries are no tensors and were left out: %s", path, len(found.dropped), first_of(found.dropped)
        )
    is_ours = found.meta.get("format") == 1  # its names are those of the network that it was written from
    entries, stripped = (found.entries, []) if is_ours else weight_sets.without_prefixes(found.entries)
    if stripped:
        log.warning("%s: dropped the prefix %s of its names", path, "".join(stripped))
    family = found.family or weight_sets.looks_like(entries)[0]
    return Checkpoint(
        StoredTensors(entries), found.arch, family, found.label, path, found.meta, found.shards, found.texts
    )


def open_checked(path: Path) -> Contents:
    source = Source.of(path)
    try:
        return weight_sets.open_file(source)
    except (ValueError, RecursionError) as error:  # a container that contains itself
        raise ValueError(f"{path}: {clean(str(error))}") from error


def choose(contents: Contents, weights: str, path: Path, option: str) -> WeightSet:
    """The set of a file that `weights` means (see `read`)."""
    labelled = [found for found in contents.sets if found.label == weights]
    if len(labelled) > 1:
        places = " and ".join(shown(found.where) for found in labelled)
        slashed = " or ".join(f"'/{shown(found.where)}'" for found in labelled)
        raise ValueError(f"{path}: it holds two sets of {weights} weights, {places}. Name one with {option}: {slashed}")
    placed = [found for found in contents.sets if found.where in (weights, weights.removeprefix("/"))]
    known = [found for found in contents.sets if found.label in KNOWN] or list(contents.sets)
    if weights == "auto":
        placed = [found for found in contents.sets if found.label == "ema"]
    if len(labelled or placed) == 1:
        return (labelled or placed)[0]
    if len(known) == 1 and (known[0].label == UNNAMED or weights in ("any", "auto")):
        return known[0]
    there = ", ".join(f"{shown(found.label)!r} (under {shown(found.where)})" for found in contents.sets)
    what = "more than one set of" if weights in ("any", "auto") else f"no {weights!r}"
    raise ValueError(f"{path} holds {what} weights; it holds {there}. Ask for one of these with {option}")


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
    texts: Mapping[str, str] | None = None,
) -> None:
    """`write` for tensors that are still to be made: `specs` (say, a checkpoint's `tensors`) gives names, shapes,
    dtypes, ties. texts: a foreign file's own metadata, which stays beside ours."""
    write_safetensors(Path(path), specs, values, metadata=file_metadata(metadata, texts))


def file_metadata(metadata: Mapping[str, object], texts: Mapping[str, str] | None = None) -> dict[str, str]:
    """The texts in a safetensors file: ours as JSON under `neon`, sealed, because the format itself has no checksum;
    without "format" transformers refuses a file."""
    return {"format": "pt", **(texts or {}), "neon": json.dumps(records.sealed({**metadata, "format": 1}))}


def about(checkpoint: Checkpoint) -> dict[str, object]:
    """What a checkpoint says about itself, as metadata of a file made from it."""
    said = {} if checkpoint.meta == checkpoint.texts else checkpoint.meta
    label = {} if checkpoint.weights == UNNAMED else {"weights": checkpoint.weights}
    return {**said, "family": checkpoint.family, "arch": checkpoint.arch, **label}


def convert(
    source: str | Path, target: str | Path, *, weights: str = "auto", option: str = "weights = ..."
) -> Checkpoint:
    """Write one weight set of any checkpoint as safetensors; what the file says about itself goes into the metadata."""
    checkpoint = read(source, weights=weights, option=option)
    check_target(Path(target), checkpoint.files)
    files.remove_abandoned(Path(target))
    metadata = {**about(checkpoint), "source_sha256": checkpoint.sha256}
    tensors = checkpoint.tensors
    write_streaming(target, tensors, tensors.items(), metadata=metadata, texts=checkpoint.texts)
    return read(target, weights="any")


def check_target(path: Path, inputs: Iterable[Path]) -> None:
    """Raises ValueError or OSError unless `path` may be written: a .safetensors file, in a folder that is there, and
    none of the inputs (also not through a link)."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: what is written is safetensors; expected a name ending in .safetensors")
    files.check_writable(path, inputs=inputs)


def content_hash(path: Path, shards: Iterable[str], hash_of: Callable[[Path], str] = files.sha256_of) -> str:
    """SHA-256 of a file, or of the lines of its shards' hashes."""
    hashes = [hash_of(path.with_name(shard)) for shard in shards]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest() if hashes else hash_of(path)


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
