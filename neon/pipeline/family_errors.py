"""What an error in code of one's own, a family or an extractor, is told as: the method in which it arose, its words,
the line, the shapes at hand, the mistakes that such errors usually come from, and what the method has to give."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from types import FrameType

from torch import Tensor

from fid.features import Extractor
from neon import contract, own_code
from neon.family import Family, Trainable, TrainableAutoencoder
from neon.first_batch import ONE_IMAGE

MOST_SHAPES = 8
CONTRACTS: tuple[type, ...] = (Family, TrainableAutoencoder, Trainable, Extractor)


def told(error: Exception) -> str:
    """One line, and a second one with what the method has to give if the error passed through a method of a
    contract."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [frame for frame in frames if isinstance(frame.f_locals.get("self"), CONTRACTS)]
    here: Mapping[str, object] = inside[-1].f_locals if inside else {}
    shapes = {name: tuple(value.shape) for name, value in _tensors(here).items()}
    listed = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:MOST_SHAPES])
    method, gives = _method(inside)
    parts = [f"{method}{own_code.told(error)}", f"with {listed}" if listed else "", _hint(error, here, shapes)]
    return "; ".join(part for part in parts if part) + gives


def _method(inside: list[FrameType]) -> tuple[str, str]:
    """The innermost method of a contract that was running, "Mine.loss: ", and the line that says what it gives."""
    for frame in reversed(inside):
        kind, name = type(frame.f_locals["self"]), frame.f_code.co_name
        kept = next(one for one in CONTRACTS if issubclass(kind, one))
        if not name.startswith("_") and callable(getattr(kept, name, None)):
            return f"{kind.__name__}.{name}: ", f"\n  expected {kind.__name__}.{contract.described(kept, name)}"
    return "", ""


def _tensors(names: Mapping[str, object]) -> dict[str, Tensor]:
    """Tensors by name, those inside a dict first."""
    inner = {
        f'{name}["{key}"]': value
        for name, values in names.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    return inner | {name: value for name, value in names.items() if isinstance(value, Tensor)}


def _hint(error: Exception, names: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> str:
    family = names.get("self")
    if isinstance(family, Family) and "NoneType" in str(error) and names.get("labels", "") is None:
        if type(family).num_classes is Family.num_classes:
            return "labels is None: define num_classes(model) to get labels"
        return "labels is None: then `sample` draws them from rng"
    if any(len(shape) > 4 and shape[0] == shape[1] for shape in shapes.values()):
        return ONE_IMAGE
    return ""
