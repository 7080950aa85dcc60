"""A frozen dataclass from a table (TOML, JSON, a checkpoint's constructor arguments), and back.

Why not a library: pydantic and its peers accept more than a config should (numbers as strings, extra keys by
default) and their messages name Python types; a researcher needs the key, the expected value and the known keys.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, Union

Section = TypeVar("Section")


def build(kind: type[Section], table: Mapping[str, object], where: str) -> Section:
    """An instance of the dataclass `kind`; an unknown key, a missing key or a wrong value is an error that names the
    key."""
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


def with_family_options(
    kind: type[Section], table: Mapping[str, object], where: str, attribute: str, options: type
) -> Section:
    """Keys of `kind` and of the family's `options` stand side by side in one table."""
    own_names = {f.name for f in fields(kind)} - {attribute}  # type: ignore[arg-type]
    family_names = {f.name for f in fields(options)}
    for key in table:
        if key not in own_names | family_names:
            raise ValueError(f"[{where}] has no key {key!r}; known keys: {', '.join(sorted(own_names | family_names))}")
    own = build(kind, {k: v for k, v in table.items() if k in own_names}, where)
    family_part: object = build(options, {k: v for k, v in table.items() if k not in own_names}, where)
    return replace(own, **{attribute: family_part})  # type: ignore[type-var]


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
            return tuple(
                _checked(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
            )
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


def table_of(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"[{where}]: expected a table, found {value!r}")
    return value


def at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
