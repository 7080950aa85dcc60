"""Every key of a config with 40 values, sane and not: refused in one line that names the key, before any work, or
accepted as it was given, and nothing else changes. What is accepted is finite, in its range, and valid JSON."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Annotated

import pytest

from neon.config_table import LARGEST, Range, to_plain
from neon.evaluation.options import Report
from neon.family import resolve
from neon.own_code import shipped
from neon.pipeline.experiment import Base, Data, Experiment, parse
from neon.sampling.options import Sampling, Synth
from neon.search.options import Select
from neon.training.recipe import Training
from tests.fuzz.guard import found, kept, watched

VALUES: list[object] = [
    0, 1, -1, 2, 3, 7, 63, 255, 10**6, 2**31, 2**32, 2**32 + 1, 2**53, 2**63 - 1, 2**63, 10**400, -(2**63),
    0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-300, 1e300, math.inf, -math.inf, math.nan,
    True, False, "", " ", "\0", "edm", "a" * 10_000, "\ud800", [], [math.nan], [1, 1], {},
]  # fmt: skip
SECTIONS: dict[str, type] = {
    "base": Base, "data": Data, "sampling": Sampling, "synth": Synth, "train": Training, "finetune": Training,
    "select": Select, "report": Report,
}  # fmt: skip
HINTS = {section: typing.get_type_hints(kind, include_extras=True) for section, kind in SECTIONS.items()}
SAMPLING: dict[str, dict[str, object]] = {"flow": {"solver": "euler", "num_steps": 4}, "xar": {"num_steps": 4}}
LINE = "tests.core.line_family:Line"
INNER = {"options", "objective", "sampling"}
"""Fields that hold a table of its own."""


def whole(family: str) -> dict[str, dict[str, object]]:
    """A config with every section and its required keys."""
    guided = resolve(family).is_guided
    scale: dict[str, object] = {"cfg_scale": 1.0} if guided else {}
    return {
        "base": {"checkpoint": "base.safetensors"},
        "data": {"path": "real.npz"},
        "sampling": {"uint8": "round"} | SAMPLING.get(family, {}),
        "synth": {"num_images": 10, **scale},
        "train": {"images": 64, "batch": 64, "lr": 1e-3},
        "finetune": {"images": 64, "batch": 64, "lr": 1e-3},
        "select": {"w": [0.5], "num_images": 8, "first_seed": 1000} | ({"cfg_scale": [1.0]} if guided else {}),
        "report": {"num_images": 8, "first_seed": 2000, "extractors": {"fashion-cnn": "a.npz"}, **scale},
    }


def shared_keys() -> Iterator[tuple[str, ...]]:
    for section, kind in SECTIONS.items():
        yield from ((section, f.name) for f in fields(kind) if f.name not in INNER)


def keys_of(family: str) -> Iterator[tuple[str, ...]]:
    found = resolve(family)
    yield from (("sampling", f.name) for f in fields(found.sampling))
    yield from (("synth", "sampling", f.name) for f in fields(found.sampling))
    yield from (("finetune", "objective", f.name) for f in fields(found.objective))


def with_value(family: str, key: tuple[str, ...], value: object) -> dict[str, object]:
    table: dict = {"family": family, **whole(family)}
    *path, last = key
    inner = table
    for name in path:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return table


def assert_sane(value: object, hint: object, where: str) -> None:
    """No number beyond its range, nothing infinite that is not allowed to be."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    allowed = [a for a in arguments if isinstance(a, Range)] if origin is Annotated else []
    if isinstance(value, float) and not any(not r.finite for r in allowed):
        assert math.isfinite(value), where
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        assert value == math.inf or abs(value) <= LARGEST or isinstance(value, float), where
        assert all(r.holds(value) for r in allowed), where
    if isinstance(value, str):
        assert value.strip(), where
        assert "\0" not in value, where
    if isinstance(value, (list, tuple)):
        for item in value:
            assert_sane(item, None, where)
    if isinstance(value, Mapping):
        for name, item in value.items():
            assert_sane(name, None, where)
            assert_sane(item, None, where)


MISSING = object()


def value_of(plain: dict, key: tuple[str, ...]) -> object:
    """What a config holds under a key: a family's options lie under `options`, and some fields are left out at their
    default."""
    inner: object = plain
    for name in key:
        assert isinstance(inner, dict)
        inner = inner[name] if name in inner else inner.get("options", {}).get(name, MISSING)
    return inner


def leaves(plain: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Every value of a config by the keys that lead to it."""
    if not isinstance(plain, dict) or not plain:
        return {path: plain}
    return {p: leaf for name, inner in plain.items() for p, leaf in leaves(inner, (*path, name)).items()}


@cache
def usual(family: str) -> dict[tuple[str, ...], object]:
    return leaves(to_plain(parse({"family": family, **whole(family)})))


def changed(family: str, plain: object) -> set[tuple[str, ...]]:
    """Where a config differs from the one without the value."""
    one, two = leaves(plain), usual(family)
    return {path for path in {*one, *two} if one.get(path) != two.get(path)}


def is_same(given: object, held: object) -> bool:
    """Whether a config holds what was given: whole numbers serve as floats, what is not finite is kept as text."""
    if isinstance(given, list):
        return isinstance(held, list) and len(given) == len(held) and all(map(is_same, given, held))
    if isinstance(given, float) and not math.isfinite(given):
        return held == str(given)
    if isinstance(given, bool) or isinstance(held, bool):
        return given is held
    return given == held or (type(given) is int and isinstance(held, float) and float(given) == held)


def outcome(family: str, key: tuple[str, ...], value: object) -> Experiment | str:
    try:
        return parse(with_value(family, key, value))
    except ValueError as error:
        return str(error)


def check(family: str, key: tuple[str, ...], value: object, made: Experiment | str) -> None:
    if isinstance(made, str):
        assert key[-1] in made or key[0] in made, made
        assert "\n" not in made
        assert len(made) < 500, made
        return
    plain = to_plain(made)
    json.dumps(plain, allow_nan=False)
    held, differences = value_of(plain, key), changed(family, plain)
    others = {path for path in differences if key[-1] not in path and path[:2] != ("synth", "sampling")}
    assert not others, f"it changed {others}"
    assert is_same(value, held) or (held is MISSING and key not in differences), f"held is {held!r}"
    for section, kind in SECTIONS.items():
        hints = HINTS[section]
        for field in fields(kind):
            if field.name not in INNER | {"arch"}:
                assert_sane(getattr(getattr(made, section), field.name), hints[field.name], ".".join(key))


@pytest.mark.parametrize("family", [*shipped(), LINE])
def test_every_key_with_forty_values(family):
    usual(family)  # what a family imports is imported before anyone watches
    keys = [*keys_of(family), *(shared_keys() if family == LINE else [])]
    for before in found("nonsense config"):  # whose key may be gone today
        if before["family"] == family and tuple(before["key"]) in keys:
            value = VALUES[before["value"]]
            check(family, tuple(before["key"]), value, outcome(family, tuple(before["key"]), value))
    for key in keys:
        with kept("nonsense config", family=family, key=key, value=0), watched():
            made = [outcome(family, key, value) for value in VALUES]
        for number, value in enumerate(VALUES):
            with kept("nonsense config", family=family, key=key, value=number):
                check(family, key, value, made[number])
    assert len(keys) * len(VALUES) >= (2_000 if family == LINE else 40)
