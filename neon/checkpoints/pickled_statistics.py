"""Reference statistics as EDM2 publishes them, a pickle of numpy arrays, read without running it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from neon.checkpoints.bounded import Bounded
from neon.checkpoints.inert_pickle import Machine, Record
from neon.checkpoints.lazy import Source
from neon.checkpoints.limits import shown
from neon.checkpoints.torch_format import rebuilders

RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")


def read_statistics(path: Path, entry: str) -> tuple[np.ndarray, np.ndarray]:
    """(mean (D,), covariance (D, D)) under `entry` of a pickled {entry: {"mu": array, "sigma": array}}.

    Raises ValueError naming the file if it is something else, or what it holds instead of `entry`.
    """
    source = Source.of(path)
    try:
        with source.open() as file:
            content = Bounded(file)
            whole = Machine(content, rebuilders(content, source)).load()
            if not isinstance(whole, Mapping):
                raise ValueError(f"expected a pickled dict of statistics, found {shown(whole)}")
            found = whole.get(entry)
            if not isinstance(found, Mapping) or not {"mu", "sigma"} <= found.keys():
                named = [str(key) for key, value in whole.items() if isinstance(value, Mapping) and "sigma" in value]
                raise ValueError(
                    f"it has no entry {entry!r} with mu and sigma; entries that have: {', '.join(named) or 'none'}"
                )
            mean, covariance = (array_of(content, found[key]) for key in ("mu", "sigma"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: expected mu (D,) and sigma (D, D), found {mean.shape} and {covariance.shape} under {entry!r}"
        )
    return mean, covariance


def array_of(content: Bounded, value: object) -> np.ndarray:
    """A pickled array of floats as float64. Raises ValueError if it is none."""
    state = value.state if isinstance(value, Record) and value.name in RECONSTRUCT else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError(f"expected an array of numbers, found {shown(value)}")
    _, shape, dtype, is_column_major, data = state
    code = dtype.args[0] if isinstance(dtype, Record) and dtype.name == "numpy.dtype" and dtype.args else None
    order = dtype.state[1] if isinstance(dtype, Record) and isinstance(dtype.state, tuple) else "<"
    if code not in ("f4", "f8") or order not in ("<", ">", "="):
        raise ValueError(f"expected an array of float32 or float64, found {shown(code)}")
    flat = np.frombuffer(content.bytes_of(data), np.dtype(order + code))
    sides = shape if isinstance(shape, tuple) else ()
    if not sides or not all(isinstance(n, int) and n > 0 for n in sides) or math.prod(sides) != flat.size:
        raise ValueError(f"an array of shape {shown(shape)} with {flat.size} numbers: damaged")
    return flat.reshape(sides, order="F" if is_column_major else "C").astype(np.float64)
