"""What tells one function of a caller's from another, so that a folder is not continued with another one."""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from numbers import Number
from types import CodeType, FunctionType

import torch
from torch import nn

SIMPLE = (Number, str, bytes, type(None), torch.dtype)
DEVICE = re.compile(r"(cpu|cuda|mps)(:\d+)?")


def fingerprint(function: Callable) -> str:
    """SHA-256 of a function's source text (of its byte code where there is no file), of the functions of its module
    that it names, and of the plain values that these use: globals, defaults, what they close over, attributes of their
    object. Plain are numbers, texts, and tuples and dicts of them; what the function itself assigns is no part of
    it, and neither are tensors, networks, lists, and devices, on which a run may go on."""
    module = getattr(_bare(function), "__module__", None)
    return hashlib.sha256("\n".join(_parts(function, module, set())).encode()).hexdigest()


def _bare(function: Callable) -> Callable:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(getattr(function, "__func__", function))


def _parts(function: Callable, module: object, seen: set[int]) -> Iterator[str]:
    if isinstance(function, functools.partial):
        yield from _told({**{str(i): value for i, value in enumerate(function.args)}, **function.keywords})
        yield from _parts(function.func, module, seen)
        return
    bare, owner = _bare(function), getattr(function, "__self__", None)
    if not isinstance(bare, FunctionType):  # an object with __call__, or a builtin
        yield type(function).__qualname__
        bare, owner = type(function).__call__, function
    if not isinstance(bare, FunctionType) or id(bare) in seen:
        return
    seen.add(id(bare))
    assigned = _assigned(bare)
    if owner is not None and not isinstance(owner, nn.Module):
        own = getattr(owner, "__dict__", {})
        yield from _told({name: value for name, value in own.items() if name not in assigned})
    try:
        yield inspect.getsource(bare)
    except (OSError, TypeError):
        for code in _codes(bare.__code__):
            constants = [value for value in code.co_consts if _is_simple(value)]
            yield f"{code.co_code.hex()} {code.co_names} {constants}"
    used = {name: value for name, value in _used(bare).items() if name not in assigned}
    yield from _told(used)
    for value in used.values():
        if isinstance(value, FunctionType) and value.__module__ == module:
            yield from _parts(value, module, seen)


def _told(values: Mapping[str, object]) -> Iterator[str]:
    yield from (f"{name} = {value!r}" for name, value in sorted(values.items()) if _is_simple(value))


def _is_simple(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_simple, value))
    if isinstance(value, dict):
        return all(_is_simple(one) for pair in value.items() for one in pair)
    return isinstance(value, SIMPLE) and not (isinstance(value, str) and DEVICE.fullmatch(value))


def _assigned(function: FunctionType) -> set[str]:
    """Globals, variables of an outer function and attributes that the function assigns: counters and the like."""
    stores = ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR")
    return {i.argval for code in _codes(function.__code__) for i in dis.get_instructions(code) if i.opname in stores}


def _used(function: FunctionType) -> dict[str, object]:
    """Values by name that the function reads."""
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    used = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not filled yet
            used[name] = cell.cell_contents
    defaults = {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    return used | defaults | (function.__kwdefaults__ or {})


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)
