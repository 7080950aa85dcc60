"""Stacks of small networks: R replicas of every weight in one tensor, computed by batched matrix products."""

# R replicas, N points, D width

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

Weights = dict[str, Tensor]
"""name -> (R, ...)"""


def fresh_layers(widths: Sequence[int], num_replicas: int, generator: torch.Generator) -> Weights:
    """Dense layers widths[0] -> widths[1] -> ...; weights and biases uniform within 1 / sqrt(inputs), torch.nn.Linear's
    default."""
    weights = {}
    for layer, (num_in, num_out) in enumerate(pairwise(widths)):
        bound = num_in**-0.5
        weights[f"{layer}.weight"] = bound * (2 * torch.rand(num_replicas, num_in, num_out, generator=generator) - 1)
        weights[f"{layer}.bias"] = bound * (2 * torch.rand(num_replicas, 1, num_out, generator=generator) - 1)
    return weights


def dense(weights: Weights, layer: int, h_RND: Tensor) -> Tensor:
    """Layer number `layer` of every replica."""
    return torch.baddbmm(weights[f"{layer}.bias"], h_RND, weights[f"{layer}.weight"])


def num_replicas(weights: Weights) -> int:
    return next(iter(weights.values())).shape[0]


def num_parameters(weights: Weights) -> int:
    """Of one replica."""
    return sum(value[0].numel() for value in weights.values())


def repeat(weights: Weights, times: int) -> Weights:
    """The stack `times` times over: replica r stands again at r + R, r + 2 R, ..."""
    return {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in weights.items()}


def split(weights: Weights, parts: int) -> list[Weights]:
    """The inverse of `repeat`: `parts` stacks of equal size."""
    pieces = {name: value.chunk(parts) for name, value in weights.items()}
    return [{name: piece[part] for name, piece in pieces.items()} for part in range(parts)]


def stack(replicas: Sequence[Weights]) -> Weights:
    """Stacks one after the other along the replica dimension."""
    return {name: torch.cat([weights[name] for weights in replicas]) for name in replicas[0]}
