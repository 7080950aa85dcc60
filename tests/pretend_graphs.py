"""CUDA graphs that are none: what is captured are the operations with the very tensors they met, and a replay runs them
on these again. As on a GPU nothing is computed in a capture: what it wrote is taken back or becomes NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from neon.runtime import speed


class PretendGraph:
    """In place of torch.cuda.CUDAGraph."""

    captured: list[PretendGraph] = []  # noqa: RUF012 - of all networks; emptied by `pretend_graphs`

    def __init__(self) -> None:
        self.operations: list[tuple] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.autocast("cpu", enabled=False):  # its casts were captured
            for func, args, kwargs, results in self.operations:
                for kept, new in zip(results, tensors_of(func(*args, **kwargs)), strict=True):
                    if kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)


class Capture(TorchDispatchMode):
    def __init__(self, graph: PretendGraph, pool: object = None):
        super().__init__()
        self.graph, self.own, self.before = graph, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func._schema.is_mutable:
            for tensor in tensors_of((args, kwargs)):
                where = tensor.untyped_storage().data_ptr()
                if where not in self.own and where not in self.before:
                    self.before[where] = tensor.untyped_storage(), tensor.untyped_storage().clone()
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
        result = func(*args, **kwargs)
        made = tensors_of(result)
        for tensor in made:
            if tensor.untyped_storage().data_ptr() not in given:
                self.own[tensor.untyped_storage().data_ptr()] = tensor
        addresses = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, (args, kwargs, made))
        self.graph.operations.append((func, *addresses))  # what a parameter is later is not in the graph
        return result

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for tensor in self.own.values():
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in self.before:
                tensor.fill_(torch.nan)
        for storage, content in self.before.values():
            storage.copy_(content)
        PretendGraph.captured.append(self.graph)


def tensors_of(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def pretend_graphs() -> Iterator[list[PretendGraph]]:
    """Run the block as if networks lay on a GPU; gives the graphs that are captured."""
    PretendGraph.captured.clear()
    with (
        mock.patch.object(speed, "_is_on_gpu", return_value=True),
        mock.patch("torch.cuda.CUDAGraph", PretendGraph),
        mock.patch("torch.cuda.graph", Capture),
        mock.patch("torch.cuda.graph_pool_handle", return_value=None),
        mock.patch("torch.cuda.synchronize"),
    ):
        yield PretendGraph.captured
