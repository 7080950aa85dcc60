"""Writes module pickles as NVIDIA's `torch_utils.persistence` does, without that package: stand-in modules give the
names."""

from __future__ import annotations

import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

SOURCE = "raise RuntimeError('embedded source was executed')\n"


def stand_in(patch: pytest.MonkeyPatch, name: str, attribute: str, value: object) -> object:
    """Make `value` importable as name.attribute, so that the pickler refers to it by that name."""
    for module in (name.partition(".")[0], name):
        if not hasattr(sys.modules.get(module), "is_stand_in"):
            patch.setitem(sys.modules, module, types.ModuleType(module))
            sys.modules[module].is_stand_in = True
    setattr(sys.modules[name], attribute, value)
    value.__module__, value.__qualname__, value.__name__ = name, attribute, attribute
    return value


class Persistent:
    """Pickles as a persistent object of class `class_name` with the given state."""

    def __init__(self, class_name: str, state: dict) -> None:
        self.meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state}

    def __reduce__(self) -> tuple:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def persistent_module(module: nn.Module, class_name: str, kwargs: dict, *, dicts: type = dict) -> Persistent:
    """A module whose children are ordinary torch modules. dicts: OrderedDict for files of torch 1.12."""
    state = dict(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        state[name] = dicts(state[name])
    return Persistent(class_name, {**state, "_init_args": (), "_init_kwargs": kwargs})


def write(patch: pytest.MonkeyPatch, path: Path, value: object, protocol: int = 4) -> Path:
    def _reconstruct_persistent_obj(meta: dict) -> None:
        raise RuntimeError("the pickle was executed")

    stand_in(patch, "torch_utils.persistence", "_reconstruct_persistent_obj", _reconstruct_persistent_obj)
    with path.open("wb") as file:
        pickle.Pickler(file, protocol=protocol).dump(value)
    return path


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(enc=nn.ModuleDict({"8x8_conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}), out=nn.Linear(4, 2))
    )
    model.register_buffer("resample_filter", torch.ones(1, 1, 2, 2))
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    model.register_buffer("absent", None)
    model.register_parameter("no_bias", None)
    return model
