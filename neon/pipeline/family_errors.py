"""What an error inside a family's own method shows besides its text: the shapes at hand, and the mistakes that such
errors usually come from."""

from __future__ import annotations

import traceback
from collections.abc import Mapping

from torch import Tensor

from neon import own_code
from neon.family import Family
from neon.first_batch import ONE_IMAGE

MOST_SHAPES = 8


def told(error: Exception, family: Family) -> str:
    """The error with its place, the shapes of the tensors in the family's method in which it arose, and a hint."""
    here = _names_in_method(error, family)
    shapes = {name: tuple(value.shape) for name, value in _tensors(here).items()}
    listed = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:MOST_SHAPES])
    parts = [own_code.told(error), f"with {listed}" if listed else "", _hint(error, family, here, shapes)]
    return "; ".join(part for part in parts if part)


def _names_in_method(error: Exception, family: Family) -> Mapping[str, object]:
    """The local names of the innermost method of the family that was running."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_locals.get("self") is family]
    return frames[-1].f_locals if frames else {}


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


def _hint(error: Exception, family: Family, names: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> str:
    if "NoneType" in str(error) and "labels" in names and names["labels"] is None:
        if type(family).num_classes is Family.num_classes:
            return "labels is None: define num_classes(model) to get labels"
        return "labels is None: then `sample` draws them from rng"
    if any(len(shape) > 4 and shape[0] == shape[1] for shape in shapes.values()):
        return ONE_IMAGE
    return ""
