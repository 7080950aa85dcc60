"""`neon check`: whether a config and its family keep the contract, tried on a few images in seconds."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from neon.family import Family
from neon.own_code import place, source_sha256
from neon.pipeline.experiment import Experiment
from neon.pipeline.family_errors import told
from neon.pipeline.preflight import scales_of, stages_of
from neon.pipeline.probe import Probe
from neon.pipeline.trial import Doubtful, NotKept, OutOfRange, Trial, Untried

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """Outcome of one check. is_caution: it passed, but is hardly what was meant."""

    name: str
    is_ok: bool
    text: str
    is_caution: bool = False


def check(config: Experiment, config_path: Path, device: torch.device) -> Iterator[Finding]:
    """Every check in turn. Those that need what an earlier one could not make are counted at the end, in one line per
    cause; so are all others without a network."""
    trial, seen = Trial(config, config_path, Probe(config, device)), dict[str, str]()
    untried: dict[str, list[str]] = {}
    checks = trial.checks()
    while checks:
        name = next(iter(checks))
        attempt = checks.pop(name)
        try:
            yield Finding(name, True, attempt())
        except Doubtful as doubt:
            yield Finding(name, True, str(doubt), is_caution=True)
        except Untried as cause:
            untried.setdefault(str(cause), []).append(name)
        except Exception as error:  # whatever a family of one's own raises is what its author wants to read
            is_ours = isinstance(error, (NotKept, ValueError, OSError)) and not place(error)
            text = str(error) if is_ours else told(error)
            first = seen.setdefault(re.sub(r"\d+", "", text), name)  # the same for another batch is the same
            if first == name:
                yield Finding(name, False, text)
            else:
                untried.setdefault(first, []).append(name)
            if name == "network":
                untried["network"] = list(checks)
                break
    for first, names in untried.items():
        count = "1 check that needs" if len(names) == 1 else f"{len(names)} checks that need"
        yield Finding("not tried", False, f"{count} {first!r}: {'; '.join(names)}")


def check_first_images(config: Experiment, family: Family, model: nn.Module, device: torch.device) -> None:
    """What a run asks before it makes S. Of every network: one image at every guidance that the config's stages ask
    for, since the network alone may know that it cannot be guided. Of a family of one's own: a few images, finite, the
    same for the same seeds, whatever their batch. Raises ValueError; a range that looks wrong is a warning, as dark or
    bright images may be meant.

    The model stays what it is; nothing is drawn from the global generator.
    """
    probe = Probe(config, device)
    probe.family, probe.model = family, model
    if source_sha256(type(family)) is not None:  # the shipped ones' tests have done this
        _check_own(Trial(config, Path(), probe))
    if family.is_guided:
        probe.try_scales(scales_of(config, stages_of(config)))


def _check_own(trial: Trial) -> None:
    checks = trial.checks()
    for name in ("images", "same seed, same image", "batch independence"):
        try:
            checks[name]()
        except OutOfRange as error:
            log.warning("%s", error)
        except NotKept as error:
            raise ValueError(f"{name}: {error}. `neon check` tries a family on a few images") from error
