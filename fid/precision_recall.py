"""Precision, recall, density and coverage: who lies in whose k-nearest-neighbour ball."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Boundary = Literal["inside", "outside"]


class Neighbours(NamedTuple):
    """precision, recall and coverage lie in [0, 1]; density can exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(
    *,
    generated: Tensor,
    reference: Tensor,
    k: int,
    boundary: Boundary = "inside",
    budget_mib: int = 1024,
    device: torch.device | str = "cpu",
) -> Neighbours:
    """The four metrics of two feature sets (N, D) and (M, D); the radius of a point is the distance to its k-th
    neighbour in its own set, itself excluded.

    precision: share of generated points inside the ball of some reference point; recall: share of reference points
    inside the ball of some generated point (Kynkaanniemi et al. 2019). density: mean number of reference balls around a
    generated point, over k; coverage: share of reference balls with a generated point inside (Naeem et al. 2020).

    boundary: whether a point exactly on a sphere counts for precision and recall ("inside": torch-fidelity and NVIDIA;
    "outside": the prdc package). Density and coverage are defined with a strict <.
    Distances are float64, in blocks that take at most `budget_mib` on `device` beside the features, which may stay on
    the CPU or on disk. Raises ValueError if a set has fewer than k + 1 points or the dimensions differ.
    """
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(
            f"generated features have {generated.shape[1]} dimensions, the reference's {reference.shape[1]}"
        )
    if k < 1 or min(len(generated), len(reference)) <= k:
        raise ValueError(
            f"k = {k} neighbours need at least {k + 1} points in each set, got {len(generated)} and {len(reference)}"
        )
    if boundary not in ("inside", "outside"):
        raise ValueError(f"boundary is 'inside' or 'outside', got {boundary!r}")
    blocks = _Blocks(generated.shape[1], budget_mib, torch.device(device))
    radius_g, radius_r = blocks.squared_radii(generated, k), blocks.squared_radii(reference, k)
    is_inside = torch.le if boundary == "inside" else torch.lt
    precise = torch.zeros(len(generated), dtype=torch.bool)
    recalled = torch.zeros(len(reference), dtype=torch.bool)
    covered = torch.zeros(len(reference), dtype=torch.bool)
    balls = 0
    for rows, columns, squared in blocks.squared_distances(reference, generated):
        own, others = radius_r[rows, None].to(squared.device), radius_g[None, columns].to(squared.device)
        precise[columns] |= is_inside(squared, own).any(0).cpu()
        recalled[rows] |= is_inside(squared, others).any(1).cpu()
        strictly = squared < own
        covered[rows] |= strictly.any(1).cpu()
        balls += int(strictly.sum())
    share = [flags.double().mean().item() for flags in (precise, recalled, covered)]
    return Neighbours(share[0], share[1], balls / (k * len(generated)), share[2])


class _Blocks:
    """Squared Euclidean distances, a block of rows times a block of columns at a time."""

    def __init__(self, dim: int, budget_mib: int, device: torch.device):
        self.device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        # a block of side s: 5 float64 matrices s x s (norms, distances, their comparison, the block before, flags), and
        # 4 s rows of features (two sets, and a temporary of each)
        doubles = budget_mib * 2**20 / 8
        self.side = int(math.sqrt((0.4 * dim) ** 2 + doubles / 5) - 0.4 * dim)
        if self.side < 1:
            raise ValueError(f"a memory budget of {budget_mib} MiB is too small for features of {dim} dimensions")

    def squared_distances(self, a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows of a, columns of b, squared distances on the device) for all pairs."""
        for i in range(0, len(a), self.side):
            x = a[i : i + self.side].to(self.device).double()
            for j in range(0, len(b), self.side):
                y = b[j : j + self.side].to(self.device).double()
                yield slice(i, i + len(x)), slice(j, j + len(y)), _squared(x, y)

    def squared_radii(self, points: Tensor, k: int) -> Tensor:
        """(N,) squared distance of every point to its k-th neighbour, itself excluded, on the CPU."""
        radii = torch.empty(len(points), dtype=torch.float64)
        nearest = torch.empty(0)
        for rows, columns, squared in self.squared_distances(points, points):
            if rows == columns:
                squared.fill_diagonal_(math.inf)
            block = squared.topk(min(k, squared.shape[1]), largest=False).values
            nearest = block if columns.start == 0 else torch.cat([nearest, block], 1).topk(k, largest=False).values
            if columns.stop == len(points):
                radii[rows] = nearest[:, k - 1].cpu()
        return radii


def _squared(x: Tensor, y: Tensor) -> Tensor:
    norms = x.square().sum(1)[:, None] + y.square().sum(1)[None]
    squared = torch.addmm(norms, x, y.T, alpha=-2)
    # what is left of equal points is rounding: they must be at distance 0, or copies of a sample would miss each
    # other's balls
    return squared.masked_fill_(squared < 1e-13 * norms, 0)
