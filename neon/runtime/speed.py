"""Faster ways to run a resident network, chosen by [sampling] speed.

exact: the same kernels in the same order. On a GPU the calls of networks whose shapes repeat are replayed as CUDA
    graphs: nothing is computed differently, the launches cost nothing. What such calls keep between them (keys and
    values) lies in `memory`, which the graphs know.
compiled: the same precision, other kernels, so rounding differs: repeated blocks of transformers are compiled
    (torch.compile), convolutions run in channels_last with the fastest algorithm that cuDNN finds.
fast: compiled, in bfloat16 with the islands that each network keeps in float32.

Weights may move in place between calls (`LiveMerge.set_w`): graphs and compiled blocks read them where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Speed = Literal["exact", "compiled", "fast"]
WARM_UP_CALLS = 3
"""Calls before a capture: libraries choose their kernels and allocate their workspaces in the first ones."""
RECOMPILE_LIMIT = 64
"""Blocks of one class share their compiled code; a U-Net has about thirty shapes of them."""
MOST_GRAPHS = 64
"""Of one network: VAR needs ten for a batch size and a guidance, and as many for the smaller last batch of a set. Calls
of further shapes run as they are."""

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Place:
    """A tensor that a call reads and writes where it lies, unlike other arguments, of which a graph has copies."""

    tensor: Tensor


class GraphedForward:
    """A forward that is captured once per shape of its arguments and replayed from then on. CUDA, inference only.

    Arguments are tensors, `Place`s, None, numbers or strings; the result is one tensor, copied out of the graph's
    memory. A graph belongs to its place: the same arguments with another one are captured anew.
    """

    def __init__(self, forward: Forward, weights: Sequence[int]):
        """weights: their addresses. In another layout or on another device they are others: the graphs are void."""
        self._forward, self.weights = forward, weights
        self._recorded: dict[object, tuple[torch.cuda.CUDAGraph, dict[object, Tensor], Tensor]] = {}
        self._calls: dict[object, int] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._memory: dict[object, Tensor] = {}

    def memory(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised, the same place at every call: a smaller shape is the beginning of it."""
        size, key = math.prod(shape), (dtype, device)
        if key not in self._memory or self._memory[key].numel() < size:
            self._recorded.clear()  # they know the smaller place
            self._calls.clear()
            with torch.inference_mode(False):  # it outlives the block
                self._memory[key] = torch.empty(size, dtype=dtype, device=device)
        return self._memory[key][:size].view(*shape)

    def __call__(self, *args: object, **named: object) -> Tensor:
        given = _by_name(args, named)
        key = (
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            tuple((name, _signature(value)) for name, value in given.items()),
        )
        if key not in self._recorded:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= WARM_UP_CALLS or len(self._recorded) == MOST_GRAPHS:
                return self._forward(*args, **named)
            self._recorded[key] = self._capture(args, named)
        graph, inputs, output = self._recorded[key]
        for name, value in given.items():
            if isinstance(value, Tensor):
                inputs[name].copy_(value)
        graph.replay()
        return output.clone()

    def _capture(
        self, args: tuple[object, ...], named: dict[str, object]
    ) -> tuple[torch.cuda.CUDAGraph, dict[object, Tensor], Tensor]:
        held = [value.clone() if isinstance(value, Tensor) else value for value in args]
        held_named = {name: value.clone() if isinstance(value, Tensor) else value for name, value in named.items()}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._forward(*held, **held_named)
        every = _by_name(held, held_named)
        return graph, {name: value for name, value in every.items() if isinstance(value, Tensor)}, output


def _by_name(args: Sequence[object], named: Mapping[str, object]) -> dict[object, object]:
    found: dict[object, object] = dict(enumerate(args))
    found.update(named)
    return found


def _signature(value: object) -> object:
    if isinstance(value, Place):
        return value.tensor.data_ptr(), _signature(value.tensor)
    return (value.shape, value.dtype, value.stride()) if isinstance(value, Tensor) else value


def memory(module: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for what `module` keeps between the calls of one batch: new, or while they are replayed as
    graphs, the place that the graphs know."""
    for forward in vars(module).values():
        if isinstance(forward, GraphedForward):
            return forward.memory(shape, dtype, device)
    return torch.empty(*shape, dtype=dtype, device=device)


def _kept(module: nn.Module) -> dict[str, Forward]:
    """A module's compiled and graphed forwards, kept on it: the next batch, point or w finds them."""
    return vars(module).setdefault("_neon_forwards", {})


def _allow_recompiles() -> None:
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # torch 2.5
    setattr(config, name, max(getattr(config, name), RECOMPILE_LIMIT))


@contextmanager
def accelerated(
    network: nn.Module,
    graphed: nn.Module | None,
    blocks: Collection[type[nn.Module]],
    speed: Speed,
    method: str = "forward",
) -> Iterator[bool]:
    """Run the block with `network` accelerated; afterwards its modules are as before. Gives whether calls are replayed
    as graphs.

    graphed: the part of `network` whose calls have few different shapes and that draws nothing; None: there is none.
    blocks: the classes of `network`'s modules that are worth compiling.
    method: what of `graphed` is replayed.
    """
    changed: list[tuple[nn.Module, str]] = []
    benchmark = torch.backends.cudnn.benchmark
    is_replayed = graphed is not None and _is_on_gpu(network)
    try:
        if speed != "exact":
            torch.backends.cudnn.benchmark = True
            _allow_recompiles()
            for module in network.modules():
                if type(module) in blocks:
                    changed.append((module, "forward"))
                    kept = _kept(module)
                    if "compiled" not in kept:
                        kept["compiled"] = torch.compile(module.forward)
                    module.forward = kept["compiled"]
        if graphed is not None and is_replayed:
            changed.append((graphed, method))
            name = "graphed" if speed == "exact" else "graphed and compiled"
            setattr(graphed, method, _graphed(graphed, method, name, _addresses(network)))
        yield is_replayed
    finally:
        torch.backends.cudnn.benchmark = benchmark
        for module, name in changed:
            vars(module).pop(name, None)


def _graphed(module: nn.Module, method: str, name: str, weights: Sequence[int]) -> GraphedForward:
    found = _kept(module).get(name)
    if isinstance(found, GraphedForward) and found.weights == weights:
        return found
    made = GraphedForward(getattr(module, method), weights)
    _kept(module)[name] = made
    return made


def _is_on_gpu(network: nn.Module) -> bool:
    return next(network.parameters()).is_cuda


def _addresses(network: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]
