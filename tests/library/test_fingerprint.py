"""A folder is continued with the same function in whatever process, and with no other one."""

import collections
import dataclasses
import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from neon.library.fingerprint import fingerprint
from tests.commands import ROOT

KNOWN, STATS, SEEN, UNLIKE = {}, {"calls": 0}, [], 1


def remembering(model, seeds):
    if len(seeds) not in KNOWN:
        KNOWN[len(seeds)] = 2.0
    return KNOWN[len(seeds)]


def counting_in_a_dict(model, seeds):
    STATS["calls"] += 1
    SEEN.append(len(seeds))


def asking_for_an_attribute(model, seeds):
    return model.UNLIKE


class Two:
    """Two functions of one object, as a trainer has them."""

    def __init__(self):
        self.calls, self.steps, self.known = 0, 8, {}

    def sample(self, model, seeds):
        self.known.setdefault(len(seeds), 1)
        return self.steps

    def loss(self, *given):
        self.calls += 1


@pytest.mark.parametrize("function", [remembering, counting_in_a_dict], ids=lambda f: f.__name__)
def test_what_a_function_remembers_is_no_part_of_it(function):
    """The folder was refused in the process that had begun it."""
    before = fingerprint(function)
    function(None, [1])
    assert fingerprint(function) == before


def test_neither_is_what_another_method_counts(monkeypatch):
    both = Two()
    before = fingerprint(both.sample)
    both.loss()
    both.sample(None, [1])
    assert fingerprint(both.sample) == before
    before = fingerprint(asking_for_an_attribute)
    monkeypatch.setitem(globals(), "UNLIKE", 2)
    assert fingerprint(asking_for_an_attribute) == before, "a global that is called as the attribute"


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    steps: int

    def __call__(self, model, seeds):
        return self.steps


class Network(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def forward(self, model, seeds):
        return self.steps


class Helper:
    def __init__(self, steps):
        self.steps = steps

    def draw(self):
        return self.steps


def of_a_class(value):
    class Sampler:
        steps = value

        def __call__(self, model, seeds):
            return self.steps

    return Sampler()


def eight(sampler):
    return 8


def eighteen(sampler):
    return 18


def by_a_method(value):
    class Sampler:
        draw = eight if value == 8 else eighteen

        def __call__(self, model, seeds):
            return self.draw()

    return Sampler()


def decorated(value):
    def scaled(function):
        @functools.wraps(function)
        def inner(model, seeds):
            return value * function(model, seeds)

        return inner

    return torch.no_grad()(scaled(remembering))


def called_by(helper):
    return lambda model, seeds: helper()


def remembered(value):
    @functools.lru_cache
    def steps():
        return value

    return called_by(steps)


def of_a_computed_attribute(value):
    class Sampler:
        @functools.cached_property
        def steps(self):
            return value

        def __call__(self, model, seeds):
            return self.steps

    return Sampler()


def of_settings(settings):
    return lambda model, seeds: settings


def of_arguments(arguments):
    return lambda model, seeds: arguments.steps


def handed_on(steps):
    def draw(model, seeds):
        model.steps = steps

    return draw


def of_a_line(value):
    return (lambda model, seeds: 8) if value == 8 else (lambda model, seeds: 18)


MAKERS = {
    "slots": Slotted,
    "network": Network,
    "method of a network": lambda steps: Network(steps).forward,
    "class": of_a_class,
    "method of another name": by_a_method,
    "decorator": decorated,
    "partial helper": lambda steps: called_by(functools.partial(max, steps, 1)),
    "remembered helper": remembered,
    "object's helper": lambda steps: called_by(Helper(steps).draw),
    "computed": of_a_computed_attribute,
    "settings with a device": lambda steps: of_settings({"steps": steps, "device": "cuda"}),
    "settings with a tensor": lambda steps: of_settings({"steps": steps, "grid": torch.ones(2)}),
    "list": lambda steps: of_settings([steps, 1]),
    "arguments": lambda steps: of_arguments(SimpleNamespace(steps=steps)),
    "attribute of the model": handed_on,
    "line": of_a_line,
    "builtin": lambda steps: max if steps == 8 else min,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_another_value_or_code_is_another_function(kind):
    """All of these were continued with 18 in place of 8."""
    make = MAKERS[kind]
    assert fingerprint(make(8)) == fingerprint(make(8))
    assert fingerprint(make(8)) != fingerprint(make(18))


def endless():
    settings = {}
    settings["self"] = settings
    return of_settings(settings)


STABLE = {
    **{name: functools.partial(make, 8) for name, make in MAKERS.items()},
    "default": lambda: of_settings(collections.defaultdict(lambda: 1.0, {"a": 1})),  # its repr has an address
    "endless": endless,
    "partial of a network": lambda: functools.partial(Network(8), None),
    "names": lambda: called_by({"a", "b", "c", "d"}.union),
}


def test_another_process_finds_the_same():
    told = "from tests.library.test_fingerprint import *; print(*(fingerprint(make()) for make in STABLE.values()))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True)
    own = {name: fingerprint(make()) for name, make in STABLE.items()}
    assert dict(zip(own, run.stdout.split(), strict=True)) == own


def test_a_used_attribute_stays_what_it_is():
    computed = of_a_computed_attribute(8)
    before = fingerprint(computed)
    computed(None, [0])
    assert fingerprint(computed) == before
    network = Network(8)
    before = fingerprint(network)
    assert fingerprint(network.eval()) == before
