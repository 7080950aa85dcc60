"""An experiment: TOML into frozen dataclasses, checked once, before anything expensive starts."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated

from neon.checkpoints.checkpoint import Checkpoint
from neon.config_table import Count, Range, Section, build, table_of, with_family_options
from neon.evaluation.options import Report
from neon.family import Family, NoOptions, resolve
from neon.images.formats import open_images
from neon.images.image_set import ImageSet
from neon.sampling.options import Sampling, Synth
from neon.search.options import Select
from neon.seeds import overlap
from neon.store import hub
from neon.training.recipe import Autoencoder, Training

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".pkl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The trained model to be improved."""

    checkpoint: str
    """Path of any supported checkpoint (neon/checkpoints/)."""
    weights: str = "ema"
    """Which weight set of the file; an absent one is an error."""
    autoencoder: str | None = None
    """Path of the autoencoder of a latent or token family."""
    prompts: str | None = None
    """Path of a text file with one prompt per line, for text-conditional models: image i has prompt i mod their
    number."""

    @property
    def is_there(self) -> bool:
        """Whether the checkpoint can be read; one on the Hub counts as there."""
        return hub.is_remote(self.checkpoint) or Path(self.checkpoint).exists()

    @property
    def autoencoder_path(self) -> Path | None:
        return None if self.autoencoder is None else hub.local(self.autoencoder)

    def read(self, family: Family) -> Checkpoint:
        """The checkpoint, by the family's own reader."""
        prompts = None if self.prompts is None else hub.local(self.prompts)
        return family.read_base(hub.local(self.checkpoint), weights=self.weights, prompts=prompts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Real images for `neon train` (Neon itself never sees any)."""

    path: str
    """A folder, zip, npz or IDX file (neon/images/)."""
    use_labels: bool = True
    size: Count | None = None
    """Crop image files to size x size RGB, as ImageNet is prepared (neon/images/crop.py)."""
    pad: Annotated[int, Range(least=0)] = 0
    """Black pixels added on every side, for networks that halve the image more often than its side allows."""

    def open(self, *, use_labels: bool = True) -> ImageSet:
        """The images, with their labels unless the caller or the config wants none."""
        return open_images(self.path, use_labels=use_labels and self.use_labels, size=self.size, pad=self.pad)

    def check_classes(self, images: ImageSet, classes: int) -> None:
        """Raise ValueError unless a network of this many classes (0: it takes no labels) can be trained on them."""
        if classes and images.num_classes > classes:
            raise ValueError(f"{self.path}: labels up to {images.num_classes - 1}, but the model has {classes} classes")
        if classes and images.labels is None:
            raise ValueError(
                f"{self.path}: the model is class-conditional ({classes} classes) and the images have no labels"
            )


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
    """Read a TOML config; overrides are "section.key=value" with a TOML value (a bare word is a string).

    The config's folder joins the end of the module path: a family or extractor of one's own may lie beside it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}")
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    table = _read(path)
    for override in overrides:
        _override(table, override)
    try:
        return parse(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, object]:
    """The table of a config. `based_on = "OTHER.toml"` takes the keys that it does not name from another config, whose
    path counts from this one's folder."""
    table = _toml(path)
    name = table.pop("based_on", None)
    if name is None:
        return table
    other = path.parent / str(name)
    if not other.is_file():
        raise FileNotFoundError(f"{path}: based_on = {name!r}: there is no config {other}")
    under = _toml(other)
    if "based_on" in under:
        raise ValueError(f"{path}: based_on = {name!r}: that config is based on another one; name that one instead")
    return _joined(under, table)


def _toml(path: Path) -> dict[str, object]:
    if path.suffix in CHECKPOINT_SUFFIXES:  # before it is read: it may be large
        raise ValueError(
            f"{path}: a config (.toml) is expected, this is a checkpoint; `neon info {path}` tells what it holds"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML in UTF-8: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: its arrays or tables are nested too deep to be read") from error


def _joined(under: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """The keys of both, those of `over` where they meet; tables that meet are joined in the same way."""
    joined = dict(under)
    for key, value in over.items():
        below = under.get(key)
        joined[key] = _joined(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return joined


def parse(table: Mapping[str, object], family: Family | None = None) -> Experiment:
    """The checked experiment of a parsed TOML table. family: in place of the one that the table names."""
    name = table.get("family")
    if not isinstance(name, str):
        raise ValueError("family: expected the name of a family (edm, var, ... or 'module:Class'), found " + repr(name))
    family = resolve(name) if family is None else family
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
            _refuse_guidance(value, family, key)
            sections[key] = _sampling(value, family, key)
        elif key in ("train", "finetune"):
            sections[key] = _training(value, family.objective, key)
        elif key == "autoencoder":
            sections[key] = _autoencoder(value, family)
        elif key == "synth" and "sampling" in value:
            own = {k: v for k, v in value.items() if k != "sampling"}
            _refuse_guidance(table_of(value["sampling"], "synth.sampling"), family, "synth.sampling")
            changed = {
                **table_of(table.get("sampling", {}), "sampling"),
                **table_of(value["sampling"], "synth.sampling"),
            }
            sampling = _sampling(changed, family, "synth.sampling")
            sections[key] = replace(build(Synth, own, key), sampling=sampling)
        else:
            sections[key] = build(known[key], value, key)
    result = Experiment(family_name=name, **sections)  # type: ignore[arg-type]  # each was built as its class above
    _check_together(result, family)
    return result


def _sampling(table: Mapping[str, object], family: Family, where: str) -> Sampling:
    try:
        return with_family_options(Sampling, table, where, "options", family.sampling)
    except ValueError as error:
        if family.sampling is NoOptions and not set(table) <= {field.name for field in fields(Sampling)}:
            lacking = f"the class {type(family).__name__} has no `sampling = Sampling`, the dataclass of its own keys"
            raise ValueError(f"{error}; {lacking}") from error
        raise


def _refuse_guidance(table: Mapping[str, object], family: Family, where: str) -> None:
    """A scale here would change no image: every block of images names its own."""
    if family.is_guided and "cfg_scale" in table:
        raise ValueError(
            f"[{where}] cfg_scale changes nothing here; name it where images are made: synth.cfg_scale, "
            "select.cfg_scale, report.cfg_scale"
        )


def _training(table: Mapping[str, object], objective: type, where: str) -> Training:
    own = {k: v for k, v in table.items() if k != "objective"}
    options: object = build(objective, table_of(table.get("objective", {}), f"{where}.objective"), f"{where}.objective")
    return replace(build(Training, own, where), objective=options)


def _autoencoder(table: Mapping[str, object], family: Family) -> Autoencoder:
    if family.trainable_autoencoder is None:
        raise ValueError(f"[autoencoder]: the family {family.name!r} has no autoencoder that can be trained here")
    where = "autoencoder.train"
    recipe = _training(table_of(table.get("train", {}), where), family.trainable_autoencoder.objective, where)
    return build(Autoencoder, {**table, "train": recipe}, "autoencoder")


def _check_together(config: Experiment, family: Family) -> None:
    guided = family.is_guided
    for name in ("synth", "select", "report"):
        section = getattr(config, name)
        if section is not None and section.cfg_scale is not None and not guided:
            raise ValueError(f"{name}.cfg_scale: the family {config.family_name!r} has no guidance")
    if (
        config.report is not None
        and config.report.cfg_scale == "selected"
        and (config.select is None or config.select.cfg_scale is None)
    ):
        raise ValueError("report.cfg_scale = 'selected' needs select.cfg_scale, the values to select from")
    if (
        config.select is not None
        and config.select.metric is not None
        and config.report is not None
        and config.select.metric not in config.report.extractors
    ):
        raise ValueError(
            f"select.metric: {config.select.metric!r} is not among report.extractors "
            f"({', '.join(config.report.extractors)})"
        )
    check_seeds(config)


def check_seeds(config: Experiment) -> None:
    """Raise ValueError if two blocks of images share a seed."""
    blocks = {
        name: range(section.first_seed, section.first_seed + section.num_images)
        for name in ("synth", "select", "report")
        if (section := getattr(config, name)) is not None
    }
    for (name, a), (other, b) in combinations(blocks.items(), 2):
        if overlap(a, b):
            raise ValueError(
                f"the seeds of {name} ({a.start} .. {a.stop - 1}) and {other} ({b.start} .. {b.stop - 1}) overlap; "
                "they must be disjoint (seeds count modulo 2^32), or the reported number is optimistic"
            )


def parse_value(name: str, text: str) -> object:
    """The value of `--set name=text`: a TOML value, or a bare word as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except RecursionError as error:
        raise ValueError(f"--set {name}: nested too deep to be read") from error


def _override(table: dict[str, object], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.strip().split(".")
    if not separator or not all(keys):
        raise ValueError(f"--set {override!r}: expected section.key=value")
    value = parse_value(name, text)
    inner = table
    for key in keys[:-1]:
        step = inner.setdefault(key, {})
        if not isinstance(step, dict):
            raise ValueError(f"--set {override!r}: {key!r} is a value, not a section")
        inner = step
    inner[keys[-1]] = value
