"""Which weight sets a file holds: every layout in use, from the bytes to sets that can be asked for by name or path."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from neon.buffers import buffers_among
from neon.checkpoints.distributed_format import is_distributed, read_distributed
from neon.checkpoints.inert_pickle import WHOLE_MODULE, Record
from neon.checkpoints.lazy import Source, StoredTensor
from neon.checkpoints.limits import MAX_JSON_BYTES, Budget, first_of, shown
from neon.checkpoints.safetensors_format import is_safetensors, read_json, read_safetensors
from neon.checkpoints.torch_format import plain, read_pickle, read_zip, state_dict_of
from neon.store import records

UNNAMED = "unnamed"
"""Label of the only set of a file that does not say whether it is an average."""
KNOWN = ("ema", "raw", UNNAMED)
FILE = "the file"

EMA = re.compile(r"(.*_)?(ema|shadow|averaged?|swa)(_.*)?", re.IGNORECASE)
"""Keys of averages: ema (DiT, EDM, IMM), model_ema (MAR, xAR), ema_model (TorchCFM), state_dict_ema (timm), params_ema
(BasicSR), G_ema, ema_model_state_dict."""
RAW = {
    "model", "net", "net_model", "var_wo_ddp", "module", "model_state_dict", "params", "G", "g", "generator",
}  # fmt: skip
"""Keys of the last weights: MAR, xAR, kl16.ckpt; TorchCFM; VAR's trainer; DeepSpeed; BasicSR; GANs."""
BARE = {"state_dict", "weights"}
NOT_WEIGHTS = re.compile(r"(^|_)(optim\w*|opt|opts|\w*sched\w*|\w*scaler|rng\w*|callbacks|loops|grads?)(_|$)", re.I)
MAX_MAPPINGS = 100_000
MAX_NESTING = 4

WRAPPERS = re.compile(
    r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module)\."
)
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
    """One state dict of a file.

    label: "ema", "raw", `UNNAMED`, what our own file says, or the place where the set lies.
    where: its place in the file, keys joined by "/". shards: the files that an index names.
    dropped: names beside the tensors whose values are no tensors. problem: why this set cannot be used.
    texts: the foreign metadata of a safetensors file.
    """

    label: str
    where: str
    entries: dict[str, StoredTensor]
    arch: dict | None = None
    family: str | None = None
    meta: dict = field(default_factory=dict)
    shards: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    problem: str = ""
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    format: str
    sets: tuple[WeightSet, ...]


def open_file(source: Source) -> Contents:
    """The table of contents of a checkpoint of any layout. Raises ValueError saying what the file is instead."""
    with source.open() as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        raise ValueError("the file is empty")
    if is_safetensors(head, source.size):
        return safetensors(source)
    if text.startswith(b"<"):
        raise ValueError(
            "this is an HTML page, not a checkpoint: the download was answered with an error or login page; fetch "
            "it again"
        )
    if text.startswith(b"version https://git-lfs"):
        raise ValueError("this is a Git LFS pointer, not the file itself; run `git lfs pull` or download it")
    if head.startswith(b"PK\x03\x04"):
        return pickled(read_zip(source), "torch")
    if head[0] == 0x80:
        value = read_pickle(source)
        if isinstance(value, Record) and is_distributed(value):
            nested, shards = read_distributed(source, value)
            found = pickled(nested, "distributed")
            return replace(found, sets=tuple(replace(part, shards=shards) for part in found.sets))
        return pickled(value, "pickle")
    if text.startswith(b"{"):
        return sharded(source)
    raise ValueError(
        "not a checkpoint of a known format (safetensors, index.json, torch.save, pickle); it begins with "
        f"{head[:16]!r}"
    )


def safetensors(source: Source) -> Contents:
    entries, texts = read_safetensors(source)
    texts = {key: text for key, text in texts.items() if key not in entries}  # the rest names tied tensors
    own = read_json(texts.pop("neon").encode("utf-8", "surrogatepass"), "our metadata") if "neon" in texts else {}
    own = records.unsealed(own, "our metadata")
    if own.get("format", 1) != 1:
        raise ValueError(f"expected format 1 of our metadata, found {shown(own['format'])}; a newer neon may read it")
    for key, kind in (("family", str), ("weights", str), ("arch", dict)):
        if not isinstance(own.get(key), (kind, type(None))):
            raise ValueError(f"our metadata says {key} = {shown(own[key])}, expected a {kind.__name__}")
    label = own.get("weights") or UNNAMED
    found = WeightSet(label, FILE, entries, own.get("arch"), own.get("family"), own or dict(texts), texts=texts)
    return Contents("safetensors", (found,))


MAX_NAME_BYTES = 255
"""Of a file name, on the file systems in use."""


def sharded(source: Source) -> Contents:
    """A Hugging Face index: {"weight_map": {name: file in the same folder}}."""
    if source.size > MAX_JSON_BYTES:
        raise ValueError(f"this JSON file has {source.size} bytes; an index of shards has at most {MAX_JSON_BYTES}")
    with source.open() as file:
        names = read_json(file.read(), "the index").get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise ValueError("this JSON file is not an index of shards: it has no weight_map")
    if not names:
        raise ValueError("its weight_map names no tensors")
    shards: dict[str, dict[str, StoredTensor]] = {}
    texts: dict[str, str] = {}
    for shard in sorted(set(names.values())):
        is_plain = not ("/" in shard or "\\" in shard or "\0" in shard or shard.startswith("."))
        if not is_plain or len(shard.encode(errors="replace")) > MAX_NAME_BYTES:
            raise ValueError(f"shard {shown(shard)} is not a plain file name")
        held = opened_shard(Source.of(source.path.with_name(shard)))
        shards[shard], texts = held.entries, texts | held.texts
    missing = [name for name, shard in names.items() if name not in shards[shard]]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} tensors are not in the shards that the index names; first: "
            f"{first_of(missing)}"
        )
    extra = [name for shard, held in shards.items() for name in held if names.get(name) != shard]
    if extra:
        raise ValueError(
            f"{len(extra)} tensors lie in shards for which the index does not name them; first: {first_of(extra)}"
        )
    entries = {name: shards[shard][name] for name, shard in names.items()}
    return Contents("sharded", (WeightSet(UNNAMED, "the index", entries, shards=tuple(sorted(shards)), texts=texts),))


def opened_shard(source: Source) -> WeightSet:
    """The only set of a shard. Raises ValueError, which names it."""
    name = shown(source.path.name)
    try:
        sets = open_file(source).sets
    except ValueError as error:
        raise ValueError(f"shard {name}: {error}") from error
    if len(sets) != 1:
        raise ValueError(f"shard {name}: it holds {len(sets)} sets of weights, expected one")
    return sets[0]


def pickled(value: object, format: str) -> Contents:
    """torch.save's dicts and the module pickles of EDM and IMM."""
    if not isinstance(value, Mapping):
        what = f"{shown(value.name)}{WHOLE_MODULE}" if isinstance(value, Record) else shown(value)
        raise ValueError(f"expected a dict of weights, found {what}")
    found = [
        part
        for path, inner in candidates(value, (), Budget(MAX_MAPPINGS, "mappings"))
        for part in sets_of(value, path, inner)
    ]
    found += shadow_lists(value, found)
    if not found:
        raise ValueError(f"no weights found: expected a state dict, or a dict of state dicts; it holds {held(value)}")
    if any(part.label == "ema" for part in found):
        found = [replace(part, label="raw") if part.label == UNNAMED else part for part in found]
    return Contents(format, tuple(found))


def candidates(value: Mapping, path: tuple[str, ...], budget: Budget) -> Iterator[tuple[tuple[str, ...], object]]:
    """(path, state dict or module) of everything in nested dicts that may be a weight set, optimisers left out."""
    budget.spend()
    inner = False
    for key, entry in value.items():
        if not isinstance(key, str) or NOT_WEIGHTS.search(key):
            continue
        here = (*path, key)
        if isinstance(entry, Mapping) and len(here) <= MAX_NESTING:
            for found in candidates(entry, here, budget):
                inner = True
                yield found
        elif isinstance(entry, Record) and label_of(here) in KNOWN and is_module(entry):
            inner = True
            yield here, entry
    if not inner and any(isinstance(entry, StoredTensor) for entry in value.values()):
        yield path, value


def is_module(entry: Record) -> bool:
    return isinstance(entry.state, dict) and "_modules" in entry.state


def label_of(path: tuple[str, ...]) -> str:
    """What a set's place says about it."""
    key = path[-1] if path else ""
    if not path or key in BARE:
        return UNNAMED if len(path) < 2 else label_of(path[:-1])
    return "ema" if EMA.fullmatch(key) else "raw" if key in RAW else "/".join(path)


def sets_of(whole: Mapping, path: tuple[str, ...], value: object) -> Iterator[WeightSet]:
    """The weight set that lies under `path`; averages that lie beside their originals are a set of their own."""
    where, label = "/".join(path) or FILE, label_of(path)
    if isinstance(value, Record):
        meta = {"dataset_kwargs": plain(whole.get("dataset_kwargs")), "pickled": sorted(shown(key) for key in whole)}
        family = FAMILIES.get(value.name)
        yield WeightSet(label, where, dict(state_dict_of(value)), arch_of(value), family, meta)
        return
    mapping = cast(Mapping, value)
    entries = {k: v for k, v in mapping.items() if isinstance(k, str) and isinstance(v, StoredTensor)}
    dropped = tuple(shown(key) for key in mapping if key not in entries)
    whole_set = WeightSet(label, where, entries, dropped=dropped)
    shadows, problem = shadows_among(entries)
    if not shadows and not problem:
        yield whole_set
        return
    hidden = set(shadows.values()) | {name for name in entries if name.startswith("model_ema.")}
    raw = {name: entry for name, entry in entries.items() if name not in hidden}
    averaged = {name: entries[shadows.get(name, name)] for name in raw}
    yield replace(whole_set, label="raw", entries=raw)
    yield replace(whole_set, label="ema", where=f"{where} (averages)", entries=averaged, problem=problem)


def shadows_among(names: Mapping[str, object]) -> tuple[dict[str, str], str]:
    """({name: name of its average}, problem) of averages inside one state dict.

    latent-diffusion's LitEma keeps `model.a.b` under `model_ema.ab`, mmdetection's hook `a.b` under `ema_a_b`.
    """
    lit = [name for name in names if name.startswith("model_ema.")]
    if lit and any(name.startswith("model.") for name in names):
        of = {
            f"model_ema.{name.removeprefix('model.').replace('.', '')}": name for name in names if name[:6] == "model."
        }
        lost = [name for name in lit if name not in of and name not in ("model_ema.decay", "model_ema.num_updates")]
        problem = f"{len(lost)} averages belong to no weight; first: {first_of(lost)}" if lost else ""
        return {of[name]: name for name in lit if name in of}, problem
    of = {f"ema_{name.replace('.', '_')}": name for name in names if "." in name}
    return {of[name]: name for name in names if name.startswith("ema_") and name in of}, ""


def shadow_lists(value: Mapping, found: list[WeightSet]) -> list[WeightSet]:
    """Averages that were saved as a list in the order of the model's parameters (`shadow_params` of torch_ema and
    diffusers): the names come from the only other set of the file."""
    lists = []
    for key, entry in value.items():
        shadow = entry.get("shadow_params") if isinstance(entry, Mapping) else None
        if not (isinstance(key, str) and isinstance(shadow, list) and shadow):
            continue
        where = f"{key}/shadow_params"
        others = [part for part in found if part.label in ("raw", UNNAMED)]
        if not all(isinstance(tensor, StoredTensor) for tensor in shadow) or len(others) != 1:
            lists.append(WeightSet("ema", where, {}, problem="a list of averages, and no one set that names them"))
            continue
        names = [name for name in others[0].entries if name not in buffers_among(others[0].entries)]
        names = [name for name in names if others[0].entries[name].storage.dtype.is_floating_point]
        fits = [others[0].entries[name].shape for name in names] == [tensor.shape for tensor in shadow]
        problem = "" if fits else f"{len(shadow)} averages do not fit the {len(names)} parameters of the model"
        entries = others[0].entries | (dict(zip(names, shadow, strict=True)) if fits else {})
        lists.append(WeightSet("ema", where, entries, problem=problem))
    return lists


def arch_of(module: Record) -> dict:
    """Constructor arguments of a pickled module, as JSON-like data, with its class under `class_name`."""
    state = cast(dict, module.state)
    if state.get("_init_args"):
        given = shown(plain(state["_init_args"]))
        raise ValueError(
            f"{shown(module.name)} was built with positional arguments {given}, their names are not in the file"
        )
    arguments = plain(state.get("_init_kwargs", {}))
    if not isinstance(arguments, dict):
        raise ValueError(f"the constructor arguments of {shown(module.name)} are {shown(arguments)}, expected a dict")
    return {"class_name": module.name, **arguments}


def held(value: Mapping) -> str:
    return ", ".join(
        f"{shown(key)} ({shown(entry.name) if isinstance(entry, Record) else type(entry).__name__})"
        for key, entry in list(value.items())[:8]
    )


def without_prefixes(entries: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """(entries, prefixes) without the names that wrappers put in front: DataParallel and AveragedModel before every
    name, torch.compile, FSDP and activation checkpointing before any part of one."""
    stripped: list[str] = []
    if "n_averaged" in entries and all(name.startswith("module.") for name in entries if name != "n_averaged"):
        entries = {name: entry for name, entry in entries.items() if name != "n_averaged"}
    while entries:
        first = WRAPPERS.match(next(iter(entries)))
        if first is None or not all(name.startswith(first[0]) for name in entries):
            break
        entries = {name.removeprefix(first[0]): entry for name, entry in entries.items()}
        stripped.append(first[0])
    inner: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        bare = WRAPPERS.sub(lambda found: found[0] if found[2] == "module" else "", name)
        if bare in inner:
            raise ValueError(
                f"some tensors exist with and without a wrapper's prefix ({shown(name)}); which are meant?"
            )
        inner[bare] = entry
    return inner, stripped if inner.keys() == entries.keys() else [*stripped, "of wrapped parts"]


def looks_like(names: Mapping[str, object]) -> tuple[str | None, str]:
    """(family, description) guessed from the names of a state dict."""
    return next((known for sign, known in SIGNS.items() if sign in names), (None, "an unknown network"))
