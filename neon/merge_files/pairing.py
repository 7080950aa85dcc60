"""Which tensor of one model belongs to which of the other, for `neon merge` and `neon diff`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from neon.buffers import parameters_among
from neon.checkpoints import checkpoint, folders
from neon.checkpoints.checkpoint import Checkpoint
from neon.checkpoints.lazy import Entry, StoredTensors
from neon.checkpoints.limits import first_of, shown
from neon.checkpoints.weight_sets import without_prefixes
from neon.family import resolve
from neon.merge import OnMismatch
from neon.own_code import shipped

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `neon merge` was asked for.

    w: one output each. weights: sets of base and synth (None: the average, else the only one). allow_missing: patterns
    of names that one model may lack; the base's are kept. variant: of folders, say "fp16". lora: what to write where
    synth is an adapter, Neon's adapter or the whole network.
    """

    w: tuple[float, ...]
    base_weights: str | None = None
    synth_weights: str | None = None
    family: str | None = None
    on_mismatch: OnMismatch = "error"
    allow_missing: tuple[str, ...] = ()
    variant: str | None = None
    lora: Literal["adapter", "full"] = "adapter"
    has_hashes: bool = True
    check: bool = False


@dataclass
class Pair:
    """One network: both checkpoints, and every tensor of the base with what it is extrapolated from (None: nothing)."""

    base: Checkpoint
    synth: Checkpoint
    part: str
    partners: dict[str, Entry | None]
    ties: dict[str, str]
    parameters: int = 0


def pairs_of(base: Path, synth: Path, request: Request, *, is_folder: bool) -> list[Pair]:
    """The networks to merge: one, or every component of two folders. Raises ValueError if they do not fit."""
    if not base.is_dir() or not is_folder:
        return [pair_up(*read_pair(base, synth, request), "", request)]
    if not synth.is_dir():
        raise ValueError(f"{base} is a folder and {synth} is not; name the file in the folder that belongs to it")
    others = {component.part: component for component in folders.components(synth, request.variant)}
    pairs = []
    for component in folders.components(base, request.variant):
        other = others.get(component.part)
        if other is None and any(fnmatch(component.part, pattern) for pattern in request.allow_missing):
            other = component  # nothing moves
        if other is None:
            raise ValueError(
                f"{synth} has no weights in {component.part or 'the folder itself'}, {base} has; keep the base's with "
                f"--allow-missing '{component.part}', or name one subfolder of each"
            )
        pairs.append(pair_up(*read_pair(component.entry, other.entry, request), component.part, request))
    return pairs


def read_pair(base: Path, synth: Path, request: Request) -> tuple[Checkpoint, Checkpoint]:
    """The weight sets of both files. Raises ValueError if nobody named them and one is an average, the other is not."""
    b = checkpoint.read(base, weights=request.base_weights or "auto", option="--base-weights")
    s = checkpoint.read(synth, weights=request.synth_weights or "auto", option="--synth-weights")
    is_named = request.base_weights and request.synth_weights
    if not is_named and {b.weights, s.weights} == {"ema", "raw"}:
        raise ValueError(
            f"{base} gives its {b.weights!r} weights and {synth} its {s.weights!r} weights, which do not belong "
            "together; name the sets with --base-weights and --synth-weights if you mean it"
        )
    if not is_named and {b.weights, s.weights} == {"ema", "unnamed"}:
        plain, average = (b, s) if s.weights == "ema" else (s, b)
        log.warning(
            "%s does not say whether its weights are an average, of %s the average (ema) is taken: the step is only "
            "that of the self-training if both are of one kind; name the sets with --base-weights and --synth-weights",
            plain.path,
            average.path,
        )
    return b, named_alike(b, s)


def named_alike(b: Checkpoint, s: Checkpoint) -> Checkpoint:
    """`s` under the base's names where both differ by a wrapper's prefix alone: it is dropped of foreign files, and our
    own keep their names."""
    base, synth = stored(b).entries, stored(s).entries
    if base.keys() == synth.keys():
        return s
    bare, other = without_prefixes(base)[0], without_prefixes(synth)[0]
    if bare.keys() != other.keys() or len(bare) != len(base):
        return s
    return replace(s, tensors=StoredTensors({name: other[key] for key, name in zip(bare, base, strict=True)}))


def pair_up(b: Checkpoint, s: Checkpoint, part: str, request: Request) -> Pair:
    """Every tensor of the base with its counterpart. A tied tensor may go by any of its names."""
    base, synth = stored(b).entries, stored(s).entries
    by_tie: dict[str, list[str]] = {}
    for later, first in b.ties.items():
        by_tie.setdefault(first, [first]).append(later)
    groups = {name: group for group in by_tie.values() for name in group}
    found = {name: next((synth[n] for n in (name, *groups.get(name, [])) if n in synth), None) for name in base}
    missing = [name for name, entry in found.items() if entry is None]
    extra = [name for name in synth if name not in base and s.ties.get(name) not in base]
    strange = [n for n in missing + extra if not any(fnmatch(n, pattern) for pattern in request.allow_missing)]
    if strange and request.on_mismatch == "error":
        raise ValueError(
            f"{b.path} and {s.path} hold different entries: {len(missing)} of {len(base)} are missing in the "
            f"self-trained model, {len(extra)} are only there; first: {first_of(strange)}. Are both of the same "
            "network and the same weight set? Name what one may lack with --allow-missing PATTERN"
        )
    if missing or extra:
        log.warning(
            "%d entries are only in the base and kept, %d are only in the other model", len(missing), len(extra)
        )
    parameters = parameter_names(b, s, request.family)
    partners: dict[str, Entry | None] = {name: found[name] if name in parameters else None for name in base}
    for name, entry in partners.items():
        if entry is not None and entry.shape != base[name].shape:
            raise ValueError(
                f"{shown(name)}: the base has shape {shown(base[name].shape)}, the self-trained model "
                f"{shown(entry.shape)}; not the same network"
            )
    if not any(entry is not None for entry in partners.values()):
        raise ValueError(f"{b.path}: there is no parameter to extrapolate, {len(base)} entries are buffers or missing")

    def is_one(first: str, second: str) -> bool:
        a, b = partners[first], partners[second]
        return a is b or (a is not None and b is not None and a.address == b.address)

    ties = {later: first for later, first in b.ties.items() if is_one(later, first)}
    return Pair(b, s, part, partners, ties, sum(entry is not None for entry in partners.values()))


def stored(found: Checkpoint) -> StoredTensors:
    assert isinstance(found.tensors, StoredTensors)
    return found.tensors


def parameter_names(found: Checkpoint, synth: Checkpoint, family: str | None) -> Collection[str]:
    """Names of the network's parameters. A file does not decide what is imported: `family`, or a shipped one that it
    names, builds the network it describes; where that cannot be done, names and numbers tell (`neon.buffers`)."""
    name = family or (found.family if found.family in shipped() else None)
    if name is not None and found.arch is not None:
        try:
            return built_parameters(name, found.arch, limit=1000 + 20 * len(found.tensors))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            if family:
                raise ValueError(
                    f"{found.path}: the network of {family!r} cannot be built from its arch ({error})"
                ) from error
            log.warning("the network cannot be built here (%s); buffers are told by name and numbers", error)
    return parameters_among(found.tensors, synth.tensors)


def built_parameters(family: str, arch: Mapping[str, object], limit: int) -> set[str]:
    """Parameter names of a network that is built without memory; refused once it has more than `limit` modules."""
    built = 0

    def count(*_: object) -> None:
        nonlocal built
        built += 1
        if built > limit:
            raise ValueError(f"its arch describes more than {limit} modules, the file has far fewer tensors")

    hook = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            return {name for name, _ in resolve(family).build(arch).named_parameters(remove_duplicate=False)}
    finally:
        hook.remove()
