"""What tells one function of a caller's from another, so that a folder is not continued with another one."""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Number
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType

import torch
from torch import Tensor, nn

PLAIN = (Number, str, bytes, type(None), torch.dtype)
DEVICE = re.compile(r"(cpu|cuda|mps)(:\d+)?")
CHANGES = {"append", "clear", "extend", "insert", "pop", "popitem", "remove", "reverse", "setdefault", "sort", "update"}
"""Methods that change a list or dict in place."""
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
MISSING = object()


def fingerprint(function: Callable) -> str:
    """SHA-256 of a function's source text (of its byte code where there is no file, and of a lambda, whose line may
    hold more), of its decorators, of the functions and methods of its module that it names, and of the plain values
    that these use: globals, defaults, what they close over, attributes of objects that they name. Plain are numbers,
    texts, and tuples, lists and dicts of them. What a function itself assigns or changes is no part of it, and neither
    are tensors, the weights of networks, and devices, on which a run may go on."""
    return hashlib.sha256("\n".join(_Walk(_module(function)).called(function)).encode()).hexdigest()


def _module(function: Callable) -> object:
    """The name of the module that holds what a call runs."""
    while isinstance(function, functools.partial):
        function = function.func
    bare = inspect.unwrap(getattr(function, "__func__", function))
    return bare.__globals__.get("__name__") if isinstance(bare, FunctionType) else getattr(bare, "__module__", None)


@dataclass
class _Walk:
    """From one function to all that it uses; every thing is told once."""

    module: object
    seen: set[object] = field(default_factory=set)

    def is_new(self, *key: object) -> bool:
        is_new = key not in self.seen
        self.seen.add(key)
        return is_new

    def called(self, function: object, owner: object = None) -> Iterator[str]:
        """What is run. owner: the object whose method it is."""
        if isinstance(function, functools.partial):
            given = {**{str(i): value for i, value in enumerate(function.args)}, **function.keywords}
            yield from self.values(given, frozenset())
            yield from self.called(function.func)
        elif isinstance(function, MethodType):
            yield from self.called(function.__func__, function.__self__)
        elif isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
            if self.is_new(id(function), id(owner)):
                yield from self.layer(function, owner)
                yield from self.called(getattr(function, "__wrapped__", None), owner)  # a decorator's
        elif function is not None:
            yield _text(function)
            yield from self.attributes(function, frozenset())

    def layer(self, function: object, owner: object) -> Iterator[str]:
        if not isinstance(function, FunctionType):  # functools.lru_cache and the like
            return
        closed_over = _closed_over(function)
        if function.__globals__.get("__name__") != self.module:  # of a decorator, only what it was given
            yield from self.values(closed_over, frozenset())
            return
        yield _source(function)
        names, given = _argvals(function, *ATTRIBUTES), _globals(function) | closed_over | _defaults(function)
        changed = _changed(function)
        yield from self.values({n: v for n, v in given.items() if not (n in changed and _is_filled(v))}, names)
        if owner is not None:
            own = {name for name in names if not (name in changed and _is_filled(_attribute(owner, name)))}
            yield from self.attributes(owner, frozenset(own - _argvals(function, "STORE_ATTR")))

    def values(self, values: Mapping[str, object], names: frozenset[str]) -> Iterator[str]:
        """Values by name. names: the attributes that the code asks of anything."""
        for name in sorted(values):
            yield f"{name} = {_text(values[name])}"
            yield from self.of(values[name], names)

    def of(self, value: object, names: frozenset[str], owner: object = None) -> Iterator[str]:
        if isinstance(value, FunctionType | MethodType | functools.partial) or hasattr(value, "__wrapped__"):
            yield from self.called(value, owner)
        elif not isinstance(value, (*PLAIN, tuple, list, dict, Tensor)):
            yield from self.attributes(value, names)

    def attributes(self, value: object, names: frozenset[str]) -> Iterator[str]:
        if not self.is_new(id(value), names):
            return
        implied = ("__init__",) if isinstance(value, type) else ("__call__", "forward")
        for name in sorted({*names, *implied}):
            found = _attribute(value, name)
            if found is MISSING or (name == "training" and isinstance(value, nn.Module)):
                continue
            yield f".{name} = {_text(found)}"
            if not isinstance(value, ModuleType):
                yield from self.of(found, names, value)


def _attribute(value: object, name: str) -> object:
    """Without running anything; the function of a property."""
    of_kind = inspect.getattr_static(type(value), name, MISSING)
    is_computed = isinstance(of_kind, property | functools.cached_property)
    found = of_kind if is_computed else inspect.getattr_static(value, name, MISSING)
    if isinstance(found, MemberDescriptorType):  # of __slots__
        return getattr(value, name, MISSING)
    for kind, inner in (
        (property, "fget"),
        (functools.cached_property, "func"),
        (staticmethod | classmethod, "__func__"),
    ):
        if isinstance(found, kind):
            return getattr(found, inner)
    return found


def _text(value: object, within: tuple[object, ...] = ()) -> str:
    """A plain value; of anything else its name, or its kind's."""
    if isinstance(value, tuple | list | dict):
        if any(value is one for one in within):
            return "..."
        parts = value.items() if isinstance(value, dict) else value
        return f"({', '.join(_text(part, (*within, value)) for part in parts)})"
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, str) and DEVICE.fullmatch(value):
        return torch.device.__qualname__
    if isinstance(value, PLAIN):
        return repr(value)
    return value.__qualname__ if inspect.isroutine(value) or isinstance(value, type) else type(value).__qualname__


def _source(function: FunctionType) -> str:
    with suppress(OSError, TypeError):
        if function.__name__ != "<lambda>":
            return textwrap.dedent(inspect.getsource(function.__code__))
    return "\n".join(f"{c.co_code.hex()} {c.co_names} {_text(c.co_consts)}" for c in _codes(function.__code__))


def _globals(function: FunctionType) -> dict[str, object]:
    names = _argvals(function, "LOAD_GLOBAL", "LOAD_NAME") - _argvals(function, "STORE_GLOBAL")
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def _closed_over(function: FunctionType) -> dict[str, object]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not filled yet
            found[name] = cell.cell_contents
    return {name: found[name] for name in found.keys() - _argvals(function, "STORE_DEREF")}


def _defaults(function: FunctionType) -> dict[str, object]:
    positional = {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    return positional | (function.__kwdefaults__ or {})


def _argvals(function: FunctionType, *opnames: str) -> frozenset[str]:
    instructions = (i for code in _codes(function.__code__) for i in dis.get_instructions(code))
    return frozenset(i.argval for i in instructions if i.opname in opnames)


def _is_filled(value: object) -> bool:
    return isinstance(value, list | dict)


def _changed(function: FunctionType) -> frozenset[str]:
    """Names of what the function changes in place: of `known[key] = value` and `self.known.append(value)`, which begin
    in the source where the name does, `known`."""
    found: set[str] = set()
    for code in _codes(function.__code__):
        placed = [(i, i.positions[::2]) for i in dis.get_instructions(code) if i.positions]
        begins = {
            begin
            for i, begin in placed
            if i.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") or (i.opname in ATTRIBUTES and i.argval in CHANGES)
        }
        loads = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_ATTR")
        found |= {i.argval for i, begin in placed if i.opname in loads and begin in begins}
    return frozenset(found)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)
