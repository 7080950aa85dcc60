"""An experiment: TOML into frozen dataclasses, checked once, before anything expensive starts."""

from __future__ import annotations

import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, Union

from neon import quantize
from neon.family import Family, resolve
from neon.precision import Precision

Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The trained model to be improved."""

    checkpoint: str
    """Path of any supported checkpoint (neon/checkpoint.py)."""
    weights: str = "ema"
    """Which weight set of the file; an absent one is an error."""
    autoencoder: str | None = None
    """Path of the autoencoder of a latent or token family."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Real images for `neon train` (Neon itself never sees any)."""

    path: str
    """A folder, zip, npz or IDX file (neon/data.py)."""
    use_labels: bool = True
    size: int | None = None
    """Crop image files to size x size RGB, as ImageNet is prepared (neon/crop.py)."""
    pad: int = 0
    """Black pixels added on every side, for networks that halve the image more often than its side allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How images are drawn, shared by synth, select and report. The family's own options stand beside these keys."""

    uint8: quantize.Rule
    """Rounding rule of neon/quantize.py."""
    batch: int = 256
    """Images per network call and rank; changes nothing but speed and memory."""
    draw_on: Literal["cpu", "device"] = "cpu"
    """Where noise is drawn: "cpu" is the same on every machine, "device" is NVIDIA's published stream on CUDA."""
    precision: Precision = "fp32"
    """Autocast of the network; fp32 is exact."""
    channels_last: bool = False
    """Memory layout of convolutional networks; changes speed and rounding only."""
    options: object = None
    """The family's own sampling options (a `Family.sampling`)."""

    def __post_init__(self) -> None:
        _at_least(1, batch=self.batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Synth:
    """The synthetic set S."""

    num_images: int
    first_seed: int = 0
    """Image i has seed first_seed + i on any number of GPUs."""
    labels: Literal["balanced", "drawn"] = "balanced"
    """balanced: image i has class i mod num_classes. drawn: from the image's own stream, as the family's published script."""
    store: Literal["images", "codes"] = "images"
    """images: decoded uint8, encoded again for training (published). codes: what the sampler made, nothing recomputed."""
    shard_images: int = 1024
    cfg_scale: float | None = None
    sampling: Sampling | None = None
    """[synth.sampling] holds the keys of [sampling] in which S differs, for example num_steps; None: S is drawn as [sampling] says."""

    def __post_init__(self) -> None:
        _at_least(1, num_images=self.num_images, shard_images=self.shard_images)
        _at_least(0, first_seed=self.first_seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One recipe for `neon train` and the short fine-tune on S. Budgets are counted in images seen, as in the paper."""

    images: int
    """Budget B in images."""
    batch: int
    """Global batch: over all ranks and accumulation rounds."""
    lr: float
    micro_batch: int | None = None
    """Images per backward pass and rank; None: the rank's whole share. Changes memory and speed, not the update."""
    seed: int = 0
    optimizer: Literal["adam", "adamw"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    lr_ramp_images: int = 0
    """Linear warm-up from 0 over this many images (the first update has rate 0); may be longer than the budget."""
    lr_cosine_images: int = 0
    """Cosine decay to 0 over the last this many images of the budget."""
    ema_decay: float | None = None
    """Exponential moving average with a constant decay per update."""
    ema_halflife_images: float | None = None
    """... with a half-life in images."""
    ema_rampup_ratio: float | None = None
    """Half-life at most this fraction of the images seen so far (EDM trains with 0.05, fine-tunes without)."""
    ema_power: float | None = None
    """... with the power function profile (1 - 1/t)^(power + 1) of Karras et al. 2024 (arXiv 2312.02696)."""
    clean_gradients: bool = False
    """Replace nan by 0 and infinities by +-1e5 in gradients (EDM) instead of stopping."""
    max_grad_norm: float | None = None
    loss_scale: float = 1.0
    precision: Precision = "fp32"
    channels_last: bool = False
    snapshot_images: int | None = None
    """Write a snapshot at the first update at or after every multiple; the last update always gives one."""
    arch: Mapping[str, object] = field(default_factory=dict)
    """Constructor arguments that replace the checkpoint's, for example dropout."""
    objective: object = None
    """The family's own loss options (a `Family.objective`)."""

    def __post_init__(self) -> None:
        _at_least(1, images=self.images, batch=self.batch)
        if self.micro_batch is not None:
            _at_least(1, micro_batch=self.micro_batch)
        if self.snapshot_images is not None:
            _at_least(1, snapshot_images=self.snapshot_images)
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")
        chosen = [name for name in ("ema_decay", "ema_halflife_images", "ema_power") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"choose one moving average, got {' and '.join(chosen)}")
        if self.ema_rampup_ratio is not None and self.ema_halflife_images is None:
            raise ValueError("ema_rampup_ratio limits a half-life: it needs ema_halflife_images")

    @property
    def has_ema(self) -> bool:
        return not (self.ema_decay is None and self.ema_halflife_images is None and self.ema_power is None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Autoencoder:
    """`neon train-autoencoder`: the family's autoencoder, from the images of [data]."""

    arch: Mapping[str, object]
    """Constructor arguments of the autoencoder."""
    train: Training
    held_out: int = 1000
    """The last this many images are never trained on; the reported PSNR is theirs."""

    def __post_init__(self) -> None:
        _at_least(1, held_out=self.held_out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Select:
    """The search for w (and cfg_scale) on one block of seeds. w = 0, w = -1 and a random direction are always there."""

    w: tuple[float, ...]
    num_images: int
    first_seed: int
    snapshots: Literal["all", "last"] = "last"
    cfg_scale: tuple[float, ...] | None = None
    labels: Literal["balanced", "drawn"] = "balanced"
    metric: str | None = None
    """Extractor whose Frechet distance chooses; None: the first of report.extractors."""

    def __post_init__(self) -> None:
        _at_least(2, num_images=self.num_images)
        _at_least(0, first_seed=self.first_seed)
        if not self.w:
            raise ValueError("w must name at least one value to try")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The numbers that are reported: another block of seeds, disjoint from synth and select."""

    num_images: int
    first_seed: int
    extractors: Mapping[str, str]
    """Extractor name -> reference statistics file; the first one is the headline."""
    labels: Literal["balanced", "drawn"] = "balanced"
    cfg_scale: float | Literal["selected"] | None = None
    inception: str | None = None
    """Weights of the FID Inception; None: the cache."""
    num_shown: int = 64
    """Images in the page's picture grids."""

    def __post_init__(self) -> None:
        _at_least(2, num_images=self.num_images)
        _at_least(0, first_seed=self.first_seed, num_shown=self.num_shown)
        if not self.extractors:
            raise ValueError("extractors must name at least one extractor and its reference file")


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """A whole config file. Sections that a verb does not need may be absent."""

    family_name: str
    base: Base | None = None
    model: Mapping[str, object] | None = None
    data: Data | None = None
    autoencoder: Autoencoder | None = None
    train: Training | None = None
    sampling: Sampling | None = None
    synth: Synth | None = None
    finetune: Training | None = None
    select: Select | None = None
    report: Report | None = None

    def need(self, section: str, kind: type[Section]) -> Section:
        """A section that the verb cannot do without."""
        value = getattr(self, section)
        if value is None:
            raise ValueError(f"the config has no [{section}] section, which this command needs")
        assert isinstance(value, kind)
        return value

    def family(self) -> Family:
        return resolve(self.family_name)


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a TOML config; overrides are "section.key=value" with a TOML value (a bare word is a string)."""
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}")
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _override(table, override)
    try:
        return experiment(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def experiment(table: Mapping[str, object]) -> Experiment:
    """The checked experiment of a parsed TOML table."""
    name = table.get("family")
    if not isinstance(name, str):
        raise ValueError("family: expected the name of a family (edm, var, ... or 'module:Class'), found " + repr(name))
    family = resolve(name)
    known = {
        "base": Base,
        "data": Data,
        "autoencoder": Autoencoder,
        "sampling": Sampling,
        "synth": Synth,
        "train": Training,
        "finetune": Training,
        "select": Select,
        "report": Report,
    }
    sections: dict[str, object] = {}
    for key, value in table.items():
        if key == "family":
            continue
        if key not in known and key != "model":
            raise ValueError(f"unknown section or key {key!r}; known: family, model, {', '.join(known)}")
        if not isinstance(value, Mapping):
            raise ValueError(f"[{key}]: expected a table, found {value!r}")
        if key == "model":
            sections[key] = value
        elif key == "sampling":
            sections[key] = _with_family_options(Sampling, value, key, "options", family.sampling)
        elif key in ("train", "finetune"):
            sections[key] = _training(value, family.objective, key)
        elif key == "autoencoder":
            sections[key] = _autoencoder(value, family)
        elif key == "synth" and "sampling" in value:
            own = {k: v for k, v in value.items() if k != "sampling"}
            changed = {**_table(table.get("sampling", {}), "sampling"), **_table(value["sampling"], "synth.sampling")}
            sampling = _with_family_options(Sampling, changed, "synth.sampling", "options", family.sampling)
            sections[key] = replace(build(Synth, own, key), sampling=sampling)
        else:
            sections[key] = build(known[key], value, key)
    result = Experiment(family_name=name, **sections)  # type: ignore[arg-type]
    _check_together(result, family)
    return result


def is_guided(family: Family) -> bool:
    return any(f.name == "cfg_scale" for f in fields(family.sampling))


def build(kind: type[Section], table: Mapping[str, object], where: str) -> Section:
    """An instance of the dataclass `kind`; an unknown key, a missing key or a wrong value is an error that names the key."""
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ValueError(f"[{where}] has no key {key!r}; known keys: {', '.join(known) or 'none'}")
    for key, f in known.items():
        if key not in table and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"[{where}] needs the key {key!r} ({_type_name(hints[key])})")
    values = {key: _checked(value, hints[key], f"{where}.{key}") for key, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"[{where}] {error}") from error


def to_plain(value: object) -> object:
    """Dataclasses, tuples and paths as JSON values, for manifests and results."""
    if is_dataclass(value) and not isinstance(value, type):
        return {key: to_plain(item) for key, item in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    is_not_json = isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value))
    return str(value) if is_not_json else value


def _with_family_options(kind: type[Section], table: Mapping[str, object], where: str, attribute: str, options: type) -> Section:
    """Keys of `kind` and of the family's `options` stand side by side in one table."""
    own_names = {f.name for f in fields(kind)} - {attribute}  # type: ignore[arg-type]
    family_names = {f.name for f in fields(options)}
    for key in table:
        if key not in own_names | family_names:
            raise ValueError(f"[{where}] has no key {key!r}; known keys: {', '.join(sorted(own_names | family_names))}")
    own = build(kind, {k: v for k, v in table.items() if k in own_names}, where)
    family_part: object = build(options, {k: v for k, v in table.items() if k not in own_names}, where)
    return replace(own, **{attribute: family_part})  # type: ignore[type-var]


def _training(table: Mapping[str, object], objective: type, where: str) -> Training:
    own = {k: v for k, v in table.items() if k != "objective"}
    options: object = build(objective, _table(table.get("objective", {}), f"{where}.objective"), f"{where}.objective")
    return replace(build(Training, own, where), objective=options)


def _autoencoder(table: Mapping[str, object], family: Family) -> Autoencoder:
    if family.trainable_autoencoder is None:
        raise ValueError(f"[autoencoder]: the family {family.name!r} has no autoencoder that can be trained here")
    where = "autoencoder.train"
    recipe = _training(_table(table.get("train", {}), where), family.trainable_autoencoder.objective, where)
    return build(Autoencoder, {**table, "train": recipe}, "autoencoder")


def _check_together(config: Experiment, family: Family) -> None:
    guided = is_guided(family)
    for name in ("synth", "select", "report"):
        section = getattr(config, name)
        if section is not None and section.cfg_scale is not None and not guided:
            raise ValueError(f"{name}.cfg_scale: the family {config.family_name!r} has no guidance")
    if config.report is not None and config.report.cfg_scale == "selected" and (config.select is None or config.select.cfg_scale is None):
        raise ValueError("report.cfg_scale = 'selected' needs select.cfg_scale, the values to select from")
    if (
        config.select is not None
        and config.select.metric is not None
        and config.report is not None
        and config.select.metric not in config.report.extractors
    ):
        raise ValueError(f"select.metric: {config.select.metric!r} is not among report.extractors ({', '.join(config.report.extractors)})")
    blocks = [(name, section) for name in ("synth", "select", "report") if (section := getattr(config, name)) is not None]
    for i, (name, a) in enumerate(blocks):
        for other, b in blocks[i + 1 :]:
            if a.first_seed < b.first_seed + b.num_images and b.first_seed < a.first_seed + a.num_images:
                raise ValueError(
                    f"the seeds of {name} ({a.first_seed} .. {a.first_seed + a.num_images - 1}) and {other} ({b.first_seed} .. "
                    f"{b.first_seed + b.num_images - 1}) overlap; they must be disjoint, or the reported number is optimistic"
                )


def _override(table: dict[str, object], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.strip().split(".")
    if not separator or not all(keys):
        raise ValueError(f"--set {override!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    inner = table
    for key in keys[:-1]:
        step = inner.setdefault(key, {})
        if not isinstance(step, dict):
            raise ValueError(f"--set {override!r}: {key!r} is a value, not a section")
        inner = step
    inner[keys[-1]] = value


def _checked(value: object, hint: object, where: str) -> object:
    """`value` if it fits the annotation (whole numbers serve as floats, lists as tuples)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for option in arguments:
            if _fits(value, option):
                return _checked(value, option, where)
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(value):
            return tuple(_checked(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))
    elif _fits(value, hint):
        return float(value) if hint is float else value  # type: ignore[arg-type]
    raise ValueError(f"{where}: expected {_type_name(hint)}, found {value!r}")


def _fits(value: object, hint: object) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, (list, tuple))
    if hint is object:
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind if isinstance(kind, type) else type(None))


def _type_name(hint: object) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin is tuple:
        return f"a list of {_type_name(arguments[0])}"
    names: dict[object, str] = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(hint) or ("a table" if origin is not None else str(getattr(hint, "__name__", hint)))


def _table(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"[{where}]: expected a table, found {value!r}")
    return value


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
