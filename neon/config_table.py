"""A frozen dataclass from a table (TOML, JSON, a checkpoint's constructor arguments), and back.

A field's annotation says everything about its value: the type, and with `Annotated[float, Range(above=0)]` the range.
Numbers are finite and texts are not empty without saying so. `build` checks a table, `check_fields` an object that a
program made: the same rules, wherever the value comes from. Rules over several fields stand in `__post_init__`.

Why not a library: pydantic and its peers accept more than a config should (numbers as strings, extra keys by
default) and their messages name Python types; a researcher needs the key, the expected value and the known keys.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, Union

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = TypeVar("Section", bound="DataclassInstance")
Made = TypeVar("Made")
LARGEST = 2**63 - 1
"""Of a whole number: what fits into the 64 bits of a tensor's size or a seed."""
LONGEST = 4096
"""Of a text, in characters: a path may not be longer."""


@dataclass(frozen=True)
class Range:
    """What a number may be, written into the annotation of its field: `lr: Annotated[float, Range(above=0)]`.

    Numbers are finite unless `finite` says otherwise; NaN lies in no range.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    finite: bool = True

    def holds(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = ((">=", self.least), (">", self.above), ("<=", self.most), ("<", self.below))
        return " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


Count = Annotated[int, Range(least=1)]
Seed = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, most=1)]


def build(kind: type[Section], table: Mapping[str, object], where: str) -> Section:
    """An instance of the dataclass `kind`. An unknown key, a wrong value, then a missing key is an error that names
    the key."""
    return _complete(kind, _given(kind, table, where), where)


@cache
def _hints(kind: type) -> dict[str, object]:
    return typing.get_type_hints(kind, include_extras=True)


def _given(kind: type[DataclassInstance], table: Mapping[str, object], where: str) -> dict[str, object]:
    """The values of a table, each checked by itself."""
    hints = _hints(kind)
    known = [f.name for f in fields(kind)]
    for key in table:
        if key not in known:
            raise ValueError(_unknown(key, known, where))
    return {key: _checked(value, hints[key], f"{where}.{key}") for key, value in table.items()}


def _unknown(key: str, known: Sequence[str], where: str) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    suggestion = f" (did you mean {close[0]!r}?)" if close else ""
    return f"[{where}] has no key {key!r}{suggestion}; known keys: {', '.join(known) or 'none'}"


def _complete(kind: type[Section], values: Mapping[str, object], where: str) -> Section:
    hints = _hints(kind)
    for f in fields(kind):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"[{where}] needs the key {f.name!r} ({_type_name(hints[f.name])})")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"[{where}] {error}") from error


def check_fields(options: DataclassInstance) -> None:
    """What `build` checks of every value, for options that a command or a program makes itself: called by
    `__post_init__`. Raises ValueError naming the field."""
    hints = _hints(type(options))
    for f in fields(options):
        value = getattr(options, f.name)
        if value is not f.default:
            _checked(value, hints[f.name], f.name)


ADDED = {"added": True}
"""Metadata of a field that came later: at its default it is left out, so that older folders and ledgers still fit."""


def construct(make: Callable[..., Made], arguments: Mapping[str, object], where: str) -> Made:
    """`make(**arguments)` with arguments from a file or a table; ValueError if their names do not fit."""
    try:
        return make(**arguments)
    except TypeError as error:
        name = getattr(make, "__name__", "it")
        raise ValueError(f"the constructor arguments in {where} do not fit {name}: {error}") from error


def to_plain(value: object) -> object:
    """Dataclasses, tuples and paths as JSON values, for manifests, ledger keys and results."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_table(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    is_not_json = isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value))
    return str(value) if is_not_json else value


def to_table(value: DataclassInstance) -> dict[str, object]:
    """A dataclass as a JSON object; see `to_plain`."""
    known = {f.name: (f, getattr(value, f.name)) for f in fields(value)}
    return {
        name: to_plain(item) for name, (f, item) in known.items() if not ("added" in f.metadata and item == f.default)
    }


def with_family_options(
    kind: type[Section], table: Mapping[str, object], where: str, attribute: str, options: type[DataclassInstance]
) -> Section:
    """Keys of `kind` and of the family's `options` stand side by side in one table."""
    own_names = {f.name for f in fields(kind)} - {attribute}
    family_names = {f.name for f in fields(options)}
    for key in table:
        if key not in own_names | family_names:
            raise ValueError(_unknown(key, sorted(own_names | family_names), where))
    own = _given(kind, {k: v for k, v in table.items() if k in own_names}, where)
    family_part = _given(options, {k: v for k, v in table.items() if k not in own_names}, where)
    built: object = _complete(options, family_part, where)
    return replace(_complete(kind, own, where), **{attribute: built})


def _checked(value: object, hint: object, where: str, *, is_finite: bool = True) -> object:
    """`value` if it fits the annotation (whole numbers serve as floats, lists as tuples, numpy's numbers as ours)."""
    if isinstance(value, Number) and hasattr(value, "item"):
        value = value.item()
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        inner, *ranges = arguments
        found = _checked(value, inner, where, is_finite=all(r.finite for r in ranges))
        for allowed in ranges:
            if isinstance(found, (int, float)) and not allowed.holds(found):
                raise ValueError(f"{where} must be {allowed}, got {value!r}")
        return found
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
    elif origin is not None and isinstance(value, Mapping):
        return {_checked(k, arguments[0], where): _checked(v, arguments[1], f"{where}.{k}") for k, v in value.items()}
    elif _fits(value, hint):
        _check_plain(value, where, is_finite)
        return float(value) if hint is float and isinstance(value, int) else value
    raise ValueError(f"{where}: expected {_type_name(hint)}, found {_shortened(value)}")


def _check_plain(value: object, where: str, is_finite: bool) -> None:
    """What no value of a config may be, whatever it stands for."""
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{where}: expected a number of at most {LARGEST}, found {_shortened(value)}")
    if isinstance(value, float) and (math.isnan(value) or (is_finite and math.isinf(value))):
        raise ValueError(f"{where}: expected a finite number, found {value}")
    if isinstance(value, str) and (not value.strip() or "\0" in value or len(value) > LONGEST):
        raise ValueError(
            f"{where}: expected a text that is not empty and holds no NUL, of at most {LONGEST} characters, "
            f"found {_shortened(value)}"
        )


def _shortened(value: object) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep; an integer of more digits than Python prints
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fits(value: object, hint: object) -> bool:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _fits(value, typing.get_args(hint)[0])
    if origin is Literal:
        return isinstance(value, (str, int)) and value in typing.get_args(hint)
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
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin is tuple:
        count = "one or more entries" if Ellipsis in arguments else f"{len(arguments)} entries"
        return f"a list [...] of {count}, each {_type_name(arguments[0])}"
    names: dict[object, str] = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(hint) or ("a table" if origin is not None else str(getattr(hint, "__name__", hint)))


def table_of(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"[{where}]: expected a table, found {value!r}")
    return value
