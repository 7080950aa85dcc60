"""Which weight sets a file holds: every layout in use, from the bytes to {"ema": ..., "raw": ...}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from neon.checkpoints.inert_pickle import Record
from neon.checkpoints.lazy import Source, StoredTensor
from neon.checkpoints.safetensors_format import read_safetensors
from neon.checkpoints.torch_format import plain, read_pickle, read_zip, state_dict_of

UNNAMED = "unnamed"
"""Label of the only set of a file that does not say whether it is an average."""

WRAPPERS = {
    ("ema",): "ema",  # DiT, EDM, IMM
    ("model_ema",): "ema",  # MAR, xAR
    ("ema_model",): "ema",  # TorchCFM
    ("net_model",): "raw",  # TorchCFM
    ("trainer", "var_wo_ddp"): "raw",  # VAR's trainer
    ("var_wo_ddp",): "raw",
    ("model",): "raw",  # MAR, xAR, kl16.ckpt
    ("net",): "raw",
    ("state_dict",): UNNAMED,
}
PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile
SIGNS = {  # a key that only this kind of file has -> (family, what it looks like)
    "pos_1LC": ("var", "a VAR transformer"),
    "quantize.embedding.weight": (None, "VAR's VQ-VAE"),
    "encoder_pos_embed_learned": ("xar", "an xAR transformer"),
    "encoder.down.0.block.0.norm1.weight": (None, "a latent-diffusion autoencoder"),
    "encoder.down_blocks.0.resnets.0.norm1.weight": (None, "a Stable Diffusion autoencoder"),
    "model.pos_embed": ("imm", "an IMM DiT"),
    "model.map_layer0_s.weight": ("imm", "an IMM U-Net"),
    "model.map_layer0.weight": ("edm", "an EDM U-Net"),
    "input_blocks.0.0.weight": ("flow", "a guided-diffusion U-Net"),
    "Conv2d_1a_3x3.conv.weight": (None, "the FID Inception"),
}
FAMILIES = {"IMMPrecond": "imm", "EDMPrecond": "edm", "VPPrecond": "edm", "VEPrecond": "edm", "iDDPMPrecond": "edm"}


@dataclass(frozen=True)
class WeightSet:
    """One state dict of a file. `where` is its place in the file, for messages; `shards` are the files that an index
    names."""

    where: str
    entries: dict[str, StoredTensor]
    arch: dict | None = None
    family: str | None = None
    meta: dict = field(default_factory=dict)
    shards: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contents:
    format: str
    sets: dict[str, WeightSet]


def open_file(source: Source) -> Contents:
    """The table of contents of a checkpoint of any layout. Raises ValueError saying what the file is instead."""
    with source.open() as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        raise ValueError("the file is empty")
    if text.startswith(b"<"):
        raise ValueError(
            "this is an HTML page, not a checkpoint: the download was answered with an error or login page; fetch "
            "it again"
        )
    if text.startswith(b"version https://git-lfs"):
        raise ValueError("this is a Git LFS pointer, not the file itself; run `git lfs pull` or download it")
    if head.startswith(b"PK\x03\x04"):
        return pickled(source, read_zip(source), "torch")
    if head[8:9] == b"{" and head[4:8] == bytes(4):
        return safetensors(source)
    if head[0] == 0x80:
        return pickled(source, read_pickle(source), "pickle")
    if text.startswith(b"{"):
        return sharded(source)
    raise ValueError(
        "not a checkpoint of a known format (safetensors, index.json, torch.save, pickle); it begins with "
        f"{head[:16]!r}"
    )


def safetensors(source: Source) -> Contents:
    entries, metadata = read_safetensors(source)
    neon = json.loads(metadata.get("neon", "{}"))
    if not isinstance(neon, dict) or neon.get("format", 1) != 1:
        raise ValueError(
            f"expected format 1 of our metadata, found {metadata['neon']:.80}; a newer version of neon may read it"
        )
    found = WeightSet("the file", entries, neon.get("arch"), neon.get("family"), neon or dict(metadata))
    return Contents("safetensors", {neon.get("weights") or UNNAMED: found})


def sharded(source: Source) -> Contents:
    """A Hugging Face index: {"weight_map": {name: file in the same folder}}."""
    with source.open() as file:
        index = json.load(file)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise ValueError("this JSON file is not an index of shards: it has no weight_map")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(map(str, names.values()))):
        if "/" in shard or "\\" in shard or shard.startswith("."):
            raise ValueError(f"shard {shard!r} is not a plain file name")
        (held,) = open_file(Source.of(source.path.with_name(shard))).sets.values()
        shards[shard] = held.entries
    missing = [name for name, shard in names.items() if name not in shards[shard]]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} tensors are not in the shards that the index names; first: "
            f"{', '.join(missing[:3])}"
        )
    entries = {name: shards[shard][name] for name, shard in names.items()}
    return Contents("sharded", {UNNAMED: WeightSet("the index", entries, shards=tuple(sorted(shards)))})


def pickled(source: Source, value: object, format: str) -> Contents:
    """torch.save's dicts and the module pickles of EDM and IMM."""
    if not isinstance(value, Mapping):
        what = value.name if isinstance(value, Record) else type(value).__name__
        raise ValueError(f"expected a dict of weights, found {what}")
    if value and all(isinstance(entry, StoredTensor) for entry in value.values()):
        return Contents(format, {UNNAMED: WeightSet("the file", dict(value))})
    sets: dict[str, WeightSet] = {}
    for path, label in WRAPPERS.items():
        found = weight_set(value, path)
        if found is not None:
            if label in sets:
                raise ValueError(
                    f"it holds two sets of {label} weights, {sets[label].where} and {found.where}; which one is meant?"
                )
            sets[label] = found
    if not sets:
        raise ValueError(
            f"no weights found: expected a state dict or one of {', '.join('/'.join(p) for p in WRAPPERS)}; it holds "
            f"{held(value)}"
        )
    return Contents(format, sets)


def weight_set(value: Mapping, path: tuple[str, ...]) -> WeightSet | None:
    inner: object = value
    for key in path:
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    where = "/".join(path)
    if isinstance(inner, Mapping) and inner and all(isinstance(entry, StoredTensor) for entry in inner.values()):
        return WeightSet(where, dict(inner))
    if isinstance(inner, Record) and isinstance(inner.state, dict) and "_modules" in inner.state:
        meta = {"dataset_kwargs": plain(value.get("dataset_kwargs")), "pickled": sorted(map(str, value))}
        return WeightSet(where, dict(state_dict_of(inner)), arch_of(inner), FAMILIES.get(inner.name), meta)
    return None


def arch_of(module: Record) -> dict:
    """Constructor arguments of a pickled module, as JSON-like data, with its class under `class_name`."""
    state = cast(dict, module.state)
    if state.get("_init_args"):
        raise ValueError(
            f"{module.name} was built with positional arguments {plain(state['_init_args'])}, their names are not in "
            "the file"
        )
    arguments = plain(state.get("_init_kwargs", {}))
    if not isinstance(arguments, dict):
        raise ValueError(f"the constructor arguments of {module.name} are {arguments!r:.80}, expected a dict")
    return {"class_name": module.name, **arguments}


def held(value: Mapping) -> str:
    return ", ".join(
        f"{key} ({entry.name if isinstance(entry, Record) else type(entry).__name__})"
        for key, entry in list(value.items())[:8]
    )


def without_prefixes(entries: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """(entries, prefixes) without the wrappers' prefixes that every name carries, however deeply nested."""
    stripped = []
    while (
        prefix := next((p for p in PREFIXES if entries and all(name.startswith(p) for name in entries)), None)
    ) is not None:
        entries = {name.removeprefix(prefix): entry for name, entry in entries.items()}
        stripped.append(prefix)
    inner = {
        name.replace("._orig_mod.", "."): entry for name, entry in entries.items()
    }  # a compiled part of an uncompiled model
    if len(inner) != len(entries):
        raise ValueError("some tensors exist with and without the prefix '_orig_mod.'; which ones are meant?")
    return inner, stripped if inner.keys() == entries.keys() else [*stripped, "._orig_mod."]


def looks_like(names: Mapping[str, object]) -> tuple[str | None, str]:
    """(family, description) guessed from the names of a state dict."""
    return next((known for sign, known in SIGNS.items() if sign in names), (None, "an unknown network"))
