"""The base of a config, with the arguments that its network is built from."""

from __future__ import annotations

from collections.abc import Mapping

from neon.checkpoints.checkpoint import Checkpoint
from neon.config_table import to_plain
from neon.family import Family
from neon.pipeline.experiment import Base, Experiment


def read_base(config: Experiment, family: Family) -> Checkpoint:
    """The checkpoint that [base] names, by the family's own reader. Where neither the file nor the family says how its
    network is built, [model] does, and the checkpoint's `is_arch_given` is true.

    Raises ValueError if [model] says something else than the file or the family; [train.arch], which `neon train`
    puts over [model], may say it too.
    """
    found = config.need("base", Base).read(family)
    if config.model is None:
        return found
    try:
        known = family.arch_of(found)
    except ValueError:
        if found.arch is not None:
            raise
        found.arch, found.is_arch_given = dict(config.model), True
        return found
    if not isinstance(known, Mapping):
        raise ValueError(f"{_origin(found, family)} must be a dict of constructor arguments, it is {known!r}")
    trained, origin = {} if config.train is None else config.train.arch, _origin(found, family)
    for key, value in config.model.items():
        if key not in known:
            raise ValueError(
                f"[model] {key} = {value!r}, but {origin} has no {key!r} among the arguments of its "
                f"network ({', '.join(map(str, known)) or 'none'})"
            )
        if to_plain(known[key]) not in (to_plain(value), to_plain(trained.get(key, value))):
            raise ValueError(
                f"[model] {key} = {value!r}, but {origin} says {key} = {known[key]!r}: correct one of them, or "
                "leave [model] out"
            )
    return found


def _origin(found: Checkpoint, family: Family) -> str:
    """Who says how the network is built."""
    return f"{found.path}" if found.arch is not None else f"{type(family).__name__}.arch_of({found.path})"
