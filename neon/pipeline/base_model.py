"""The base of a config, with the arguments that its network is built from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from neon import contract, own_code
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
        with _families_named(found, family):
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


def load_network(found: Checkpoint, family: Family) -> nn.Module:
    """The network of a checkpoint, by the family's own `load`. Raises ValueError if `load` returns something else, and
    naming both families if it fails on a file that another one wrote."""
    with _families_named(found, family):
        return contract.network(f"{type(family).__name__}.load", family.load(found))


@contextmanager
def _families_named(found: Checkpoint, family: Family) -> Iterator[None]:
    """A family that fails on a checkpoint is told by name, and so is the one that wrote the file, if it is another: a
    file of a class that was renamed loads, so the two names alone are no mistake."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        kind, wrote = type(family), found.meta.get("family")
        reads = family.name if family.name in own_code.OURS else f"{kind.__module__}:{kind.__qualname__}"
        if wrote in (None, family.name, reads):
            raise
        said = own_code.told(error) if own_code.place(error) else str(error)
        raise ValueError(
            f"{found.path} was written by the family {wrote!r} and cannot be read by {reads!r}: name {wrote!r} "
            f"(family in a config, --family of a command), or a checkpoint of {reads!r}. What {reads!r} says "
            f"of it: {said}"
        ) from error


def _origin(found: Checkpoint, family: Family) -> str:
    """Who says how the network is built."""
    return f"{found.path}" if found.arch is not None else f"{type(family).__name__}.arch_of({found.path})"
