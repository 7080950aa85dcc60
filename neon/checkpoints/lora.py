"""LoRA adapters in PEFT's, diffusers' and kohya's layouts: what they add to a network, and Neon's adapter from one.

An adapter trained on S says theta_syn = theta_base + scale B A. So theta_base - w (theta_syn - theta_base) is the base
with the adapter -w scale B A: a small file that every tool can apply. Scaling A and B by themselves, or extrapolating
them one by one, is something else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from neon.checkpoints.checkpoint import Checkpoint
from neon.checkpoints.lazy import Entry
from neon.checkpoints.limits import first_of, shown
from neon.checkpoints.safetensors_format import read_json
from neon.merge import is_finite

DOWN, UP = "down", "up"
FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_embedding_A|lora_embedding_B|"
    r"lora_mid)(\.default)?(?P<end>\.weight|\.bias)?"
)
OTHER_METHODS = re.compile(
    r".*\.(lora_magnitude_vector.*|dora_scale|hada_\w+|lokr_\w+|oft_\w+|ia3_l|lora_E|vera_\w+|bora_\w+)"
)
PEFT_PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
SHIFTED_STARTS = ("pissa", "olora", "corda", "loftq")
"""Initialisations of PEFT that take a part out of the base's weights: the adapter is then no update of the base."""


@dataclass(frozen=True)
class Factors:
    """One module's update: scale * up @ down. down: (rank, inputs, ...); up: (outputs, rank, ...)."""

    down: Tensor
    up: Tensor
    scale: float
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def update(self, shape: tuple[int, ...], *, is_transposed: bool = False) -> Tensor:
        """The float64 update of a weight of this shape. Raises ValueError if it does not fit."""
        flat = self.scale * (self.up.double().flatten(1) @ self.down.double().flatten(1))
        if self.is_embedding or is_transposed:
            flat = flat.T
        if flat.numel() != math.prod(shape) or flat.shape[0] != shape[0]:
            raise ValueError(f"an update of {tuple(flat.shape)} does not fit a weight of shape {shown(shape)}")
        return flat.reshape(shape)


@dataclass(frozen=True)
class Adapter:
    """names: module -> the names of (down, up, alpha) in the file; others: whole tensors trained beside the factors."""

    path: Path
    factors: dict[str, Factors]
    names: dict[str, dict[str, str]]
    others: dict[str, Tensor]
    texts: Mapping[str, str]
    config: dict | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError(f"{self.path} holds no LoRA factors")


def is_adapter(names: Mapping[str, object]) -> bool:
    return any(FACTOR.fullmatch(name) or OTHER_METHODS.fullmatch(name) for name in names)


def read_adapter(found: Checkpoint) -> Adapter:
    """An adapter from its file and the adapter_config.json beside it. Raises ValueError for other methods than LoRA."""
    foreign = [name for name in found.tensors if OTHER_METHODS.fullmatch(name)]
    if foreign:
        raise ValueError(
            f"{found.path} is no plain LoRA ({shown(foreign[0])}); its update is no product of two factors"
        )
    config = read_config(found.path.with_name(CONFIG))
    tensors = {name: found.tensors[name] for name in found.tensors}
    names: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = FACTOR.fullmatch(name)
        if match and (match["kind"] == "lora_mid" or match["end"] == ".bias"):
            raise ValueError(f"{found.path}: {shown(name)} is a kind of LoRA that is not supported")
        if match:
            kind = DOWN if match["kind"] in ("lora_A", "lora_down", "lora.down", "lora_embedding_A") else UP
            names.setdefault(match["module"], {})[kind] = name
    for name in tensors:
        if name.endswith(".alpha") and name.removesuffix(".alpha") in names:
            names[name.removesuffix(".alpha")]["alpha"] = name
    halves = [module for module, parts in names.items() if not {DOWN, UP} <= parts.keys()]
    if halves:
        raise ValueError(f"{found.path}: {len(halves)} modules have only one of their two factors: {first_of(halves)}")
    used = {name for parts in names.values() for name in parts.values()}
    others = {name: value for name, value in tensors.items() if name not in used}
    factors = {}
    for module, parts in names.items():
        down, up = tensors[parts[DOWN]], tensors[parts[UP]]
        if down.dim() < 2 or up.dim() < 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
            raise ValueError(f"{found.path}: the factors of {shown(module)} do not fit each other")
        for factor in (down, up):
            if not factor.is_floating_point() or not is_finite(factor):
                what = "not finite" if factor.is_floating_point() else f"of {factor.dtype}"
                raise ValueError(f"{found.path}: a factor of {shown(module)} is {what}")
        stored = tensors[parts["alpha"]] if "alpha" in parts else None
        alpha = None if stored is None else stored.item() if stored.numel() == 1 else stored.tolist()
        scale = scale_of(module, down.shape[0], alpha, config, found)
        factors[module] = Factors(down, up, scale, is_embedding="embedding_A" in parts[DOWN])
    return Adapter(found.path, factors, names, others, found.texts, config, tensors)


def read_config(path: Path) -> dict | None:
    if not path.is_file():
        return None
    config = read_json(path.read_bytes()[: 1 << 20], f"{path}")
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
        raise ValueError(f"{path}: {shown(config.get('peft_type'))} (or DoRA) is no plain LoRA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(SHIFTED_STARTS):
        raise ValueError(
            f"{path}: {shown(start)} changed the base's weights; convert the adapter to plain LoRA with PEFT"
        )
    return config


def scale_of(module: str, rank: int, alpha: object, config: dict | None, found: Checkpoint) -> float:
    """What multiplies up @ down: alpha / rank; 1 where diffusers stores neither. alpha: beside the factors."""
    said: object = alpha
    root: float = rank
    if config is not None and alpha is None:
        bare = module.removeprefix(PEFT_PREFIX)
        expected = config.get("r", rank)
        if rank not in (expected, *patterns_of(config, "rank_pattern").values()):
            raise ValueError(f"{found.path}: {shown(module)} has rank {rank}, {CONFIG} says r = {shown(expected)}")
        said = patterned(patterns_of(config, "alpha_pattern"), bare, config.get("lora_alpha"))
        root = math.sqrt(rank) if config.get("use_rslora") else rank
    elif alpha is None and "lora_adapter_metadata" in found.texts:
        table = read_json(found.texts["lora_adapter_metadata"].encode(), "lora_adapter_metadata")
        part, _, bare = module.partition(".")
        said = patterned(patterns_of(table, f"{part}.alpha_pattern"), bare, table.get(f"{part}.lora_alpha"))
        root = math.sqrt(rank) if table.get(f"{part}.use_rslora") else rank
    elif alpha is None:
        if module.startswith(PEFT_PREFIX):
            raise ValueError(f"{found.path}: {CONFIG} must lie beside it; it says how the update is scaled")
        return 1.0
    if not isinstance(said, (int, float)) or isinstance(said, bool) or not math.isfinite(said):
        raise ValueError(f"{found.path}: {shown(module)} has alpha {shown(said)}, expected a number")
    return said / root


def patterns_of(config: Mapping, key: str) -> dict:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{key}: expected a table of patterns, found {shown(patterns)}")
    return patterns


def patterned(patterns: dict, module: str, default: object) -> object:
    """The value of the first pattern that a module's name ends with. PEFT takes regular expressions; plain names only
    here, because a file's expression may take for ever."""
    for pattern, value in patterns.items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise ValueError(f"the pattern {shown(pattern)} is a regular expression; only names are supported")
        if module == pattern or module.endswith(f".{pattern}"):
            return value
    return default


def scaled(adapter: Adapter, by: float) -> Adapter:
    """The adapter of `by` times the update, scale folded in: up is float32 and every alpha the rank."""
    tensors = dict(adapter.tensors)
    for module, parts in adapter.names.items():
        factors = adapter.factors[module]
        tensors[parts[UP]] = (by * factors.scale * factors.up.double()).float()
        if "alpha" in parts:
            tensors[parts["alpha"]] = torch.full_like(tensors[parts["alpha"]], factors.rank)
    return replace(adapter, tensors=tensors, texts=unscaled_texts(adapter), config=unscaled(adapter))


def joined(base: Adapter, synth: Adapter, w: float) -> Adapter:
    """Of two adapters on one network: (1 + w) times the first's update - w times the second's, ranks added up."""
    if base.factors.keys() != synth.factors.keys() or base.others or synth.others:
        apart = sorted(base.factors.keys() ^ synth.factors.keys() or base.others.keys() | synth.others.keys())
        raise ValueError(f"{base.path} and {synth.path} do not adapt the same modules; first: {first_of(apart)}")
    tensors = dict(base.tensors)
    for module, parts in base.names.items():
        b, s = base.factors[module], synth.factors[module]
        if b.down.shape[1:] != s.down.shape[1:] or b.up.shape[:1] != s.up.shape[:1]:
            raise ValueError(f"{shown(module)}: the two adapters are of networks of different size")
        ups = ((1 + w) * b.scale * b.up.double(), -w * s.scale * s.up.double())
        tensors[parts[UP]] = torch.cat(ups, dim=1).float()
        tensors[parts[DOWN]] = torch.cat([b.down.float(), s.down.float()])
        if "alpha" in parts:
            tensors[parts["alpha"]] = torch.full_like(tensors[parts["alpha"]], b.rank + s.rank)
    return replace(base, tensors=tensors, texts=unscaled_texts(base), config=unscaled(base, tensors))


def unscaled(adapter: Adapter, tensors: Mapping[str, Tensor] | None = None) -> dict | None:
    """PEFT's config for factors whose scale is 1: alpha is the rank, module by module where ranks differ."""
    if adapter.config is None:
        return None
    held = adapter.tensors if tensors is None else tensors
    ranks = {m.removeprefix(PEFT_PREFIX): held[parts[DOWN]].shape[0] for m, parts in adapter.names.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {module: own for module, own in ranks.items() if own != rank}
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": odd, "alpha_pattern": odd, "use_rslora": False}
    return {**adapter.config, **plain, "inference_mode": True}


def unscaled_texts(adapter: Adapter) -> dict[str, str]:
    """The file's metadata; diffusers' copy of the configs goes, without it every scale is 1."""
    return {key: text for key, text in adapter.texts.items() if key != "lora_adapter_metadata"}


@dataclass(frozen=True)
class Adapted:
    """A weight of the base plus an adapter's update, in float64: what the merge takes as the self-trained model's."""

    base: Entry
    factors: Factors
    is_transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def address(self) -> tuple[object, ...]:
        return (id(self),)

    def read(self) -> Tensor:
        return self.base.read().double() + self.factors.update(self.shape, is_transposed=self.is_transposed)


def targets(adapter: Adapter, names: Mapping[str, object], part: str) -> dict[str, str]:
    """module of the adapter -> name of the weight it updates, among a network's names.

    part: the network's place in a pipeline ("unet"); kohya's `lora_unet_a_b`, diffusers' `unet.a.b` and PEFT's
    `base_model.model.a.b` all mean `a.b.weight`.
    """
    flat = {name.removesuffix(".weight").replace(".", "_"): name for name in names if name.endswith(".weight")}
    kohya = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_", "": "lora_unet_"}
    found = {}
    for module in adapter.factors:
        bare = module.removeprefix(PEFT_PREFIX)
        spellings = [bare, bare.removeprefix(f"{part}." if part else "unet.")]
        name = next((f"{spelling}.weight" for spelling in spellings if f"{spelling}.weight" in names), None)
        name = name or flat.get(module.removeprefix(kohya.get(part, f"lora_{part}_")))
        if part == "text_encoder" and name is None:
            name = flat.get(module.removeprefix("lora_te1_"))
        if name is not None:
            found[module] = name
    return found


def config_text(config: Mapping[str, object]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
