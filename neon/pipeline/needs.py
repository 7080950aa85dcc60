"""The files that a verb reads, and for each missing one the command that fetches or makes it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fid.inception import NAME, WEIGHTS
from fid.weights import cache_folder
from neon.pipeline.experiment import Experiment
from neon.published.hints import how_to_get
from neon.store import hub

Part = Literal["base", "autoencoder", "report", "data"]


@dataclass(frozen=True)
class Missing:
    """A file that is not there. key: where the config names it. how: a command or advice, "" if none is known."""

    path: Path
    key: str
    how: str

    def __str__(self) -> str:
        return f"{self.path}  ({self.key})" + (f"\n    {self.how}" if self.how else "")


def missing(config: Experiment, parts: Collection[Part], config_path: Path) -> list[Missing]:
    """All files of these parts of the config that are not there. config_path: for the commands that are advised.

    Files on the Hub (hf://...) are fetched when they are used."""
    needed = _needed(config, parts, config_path)
    absent = [found for found in needed if not (hub.is_remote(found.path) or found.path.exists())]
    return [_beside(found, config_path) for found in absent]


def _beside(found: Missing, config_path: Path) -> Missing:
    """With advice to go into the config's folder, if the file is there under this name."""
    beside = config_path.parent / found.path
    if found.path.is_absolute() or not beside.exists():
        return found
    folder = shlex.quote(str(config_path.parent))
    return replace(found, how=f"did you mean {beside}? Paths are relative to the working folder: cd {folder}")


def check_all_there(config: Experiment, parts: Collection[Part], config_path: Path) -> None:
    """Raise FileNotFoundError that lists every missing file, each with its command."""
    if absent := missing(config, parts, config_path):
        count = "1 file is" if len(absent) == 1 else f"{len(absent)} files are"
        raise FileNotFoundError(f"{config_path}: {count} missing:\n" + "\n".join(f"  {one}" for one in absent))


def _needed(config: Experiment, parts: Collection[Part], config_path: Path) -> Iterator[Missing]:
    if config.base is not None and "base" in parts:
        path = Path(config.base.checkpoint)
        yield Missing(path, "base.checkpoint", how_to_get(path) or _train(config, path, config_path))
    if config.base is not None and config.base.autoencoder is not None and "autoencoder" in parts:
        path = Path(config.base.autoencoder)
        yield Missing(path, "base.autoencoder", how_to_get(path) or _train_autoencoder(path, config_path))
    if config.report is not None and "report" in parts:
        for name, reference in config.report.extractors.items():
            path = Path(reference)
            yield Missing(path, f"report.extractors.{name!r}", how_to_get(path) or _make_reference(name, path))
        if NAME in config.report.extractors:
            yield _inception(config.report.inception)
    if config.data is not None and "data" in parts and not config.data.path.startswith("torchvision:"):
        path = Path(config.data.path)
        yield Missing(path, "data.path", how_to_get(path))


def _make_reference(extractor: str, path: Path) -> str:
    """The command that makes it, under a name that `neon fid ref` writes."""
    if path.suffix.lower() == ".npz":
        out, name_it = path, ""
    else:
        out = path.with_name(f"{path.name}.npz")
        if out.is_file():
            return f"did you mean {out}?"
        name_it = f", and name {out} in the config: a reference's name ends in .npz"
    command = f"neon fid ref --extractor {shlex.quote(extractor)} --data IMAGES --out {shlex.quote(str(out))}"
    return f"make it: {command}{name_it}"


def _train(config: Experiment, path: Path, config_path: Path) -> str:
    """The command that trains a base of one's own, if the config says how and the file is where it would lie."""
    if config.train is None or config.model is None or path.name != "model.safetensors":
        return ""
    return f"make it: neon train {shlex.quote(str(config_path))} --out {shlex.quote(str(path.parent))}"


def _train_autoencoder(path: Path, config_path: Path) -> str:
    """The command that trains it, if the config called like its folder lies beside this one."""
    recipe = config_path.with_name(f"{path.parent.name}.toml")
    command = f"neon train-autoencoder {shlex.quote(str(recipe))} --out {shlex.quote(str(path.parent))}"
    return f"make it: {command}" if recipe.is_file() else ""


def _inception(named: str | None) -> Missing:
    """The FID Inception: the file that the config names, or one in the cache under any of its names."""
    if named is not None:
        return Missing(Path(named), "report.inception", how_to_get(Path(named)))
    found = [path for name in WEIGHTS.files if (path := cache_folder() / name).is_file()]
    path = found[0] if found else cache_folder() / WEIGHTS.files[0]
    return Missing(path, "the FID Inception's weights", f"neon download {WEIGHTS.files[0]}")
