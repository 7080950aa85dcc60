"""Precision, recall, density and coverage: who lies in whose k-nearest-neighbour ball."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fid.features import full_float32

Boundary = Literal["inside", "outside"]
SPARE = 8
"""Candidates beyond the k-th neighbour: those that float32 cannot tell from it must be among them."""
MANY = 1 / 256
"""Share of a block's pairs that float32 may leave open; beyond it float64 for the whole block is faster."""
TIE = 1e-12
"""Relative difference up to which two squared distances count as equal."""


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
    Distances are compared in float32 where its error bound decides, else in float64, and count as equal where those
    differ by rounding. Blocks take at most `budget_mib` on `device` beside the features, which may stay on the CPU or
    on disk. Raises ValueError if a set has fewer than k + 1 points, the dimensions differ or a feature is not
    finite.
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
    with full_float32(torch.device(device)):
        return _counted(_Pairs(generated, reference, budget_mib, torch.device(device)), k, boundary)


def _counted(pairs: _Pairs, k: int, boundary: Boundary) -> Neighbours:
    generated, reference = pairs.generated, pairs.reference
    radius_g, radius_r = pairs.squared_radii(generated, k), pairs.squared_radii(reference, k)
    precise = torch.zeros(len(generated), dtype=torch.bool)
    recalled = torch.zeros(len(reference), dtype=torch.bool)
    covered = torch.zeros(len(reference), dtype=torch.bool)
    balls = 0
    for block in pairs.blocks(reference, generated):
        inside, strictly = pairs.compare(block, radius_r[block.rows, None])
        precise[block.columns] |= (inside if boundary == "inside" else strictly).any(0).cpu()
        covered[block.rows] |= strictly.any(1).cpu()
        balls += int(strictly.count_nonzero())
        inside, strictly = pairs.compare(block, radius_g[None, block.columns])
        recalled[block.rows] |= (inside if boundary == "inside" else strictly).any(1).cpu()
    share = [flags.double().mean().item() for flags in (precise, recalled, covered)]
    return Neighbours(share[0], share[1], balls / (k * len(generated)), share[2])


class _Block(NamedTuple):
    """All pairs of some rows of one set, x (R, D), and some columns of another, y (C, D)."""

    rows: slice
    columns: slice
    x: Tensor
    y: Tensor
    rough: Tensor
    """(R, C) squared distances in float32."""


class _Pairs:
    """Squared Euclidean distances within and between two sets, a block of rows times a block of columns at a time.

    errors: (dtype, what distances by scalar products in it are off by, at most), the fast one first. Points are centred
        first, because the error grows with the norms.
    """

    def __init__(self, generated: Tensor, reference: Tensor, budget_mib: int, device: torch.device):
        self.generated, self.reference = generated, reference
        self.device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        dim = generated.shape[1]
        # a block of side s: at most 5 float64 matrices s x s (norms, distances, their comparison, flags), and 4 s rows
        # of features (two sets, and a temporary of each)
        doubles = budget_mib * 2**20 / 8
        self.side = int(math.sqrt((0.4 * dim) ** 2 + doubles / 5) - 0.4 * dim)
        if self.side < 1:
            raise ValueError(f"a memory budget of {budget_mib} MiB is too small for features of {dim} dimensions")
        if self.side >= 64:
            self.side -= self.side % 64  # BLAS takes half as long again for sides that are no multiple of its vectors
        self.center = torch.zeros(dim, device=self.device)
        center = torch.stack([x.sum(0, dtype=torch.float64) for _, x in self._parts(reference)]).sum(0).float()
        if center.isfinite().all():
            self.center = center / len(reference)
        norms = [
            self._centred(x, torch.float64).square_().sum(1).max()
            for points in (generated, reference)
            for _, x in self._parts(points)
        ]
        two_norms = 2 * torch.stack(norms).max().item()
        if not math.isfinite(two_norms):
            raise ValueError("features must be finite numbers")
        self.errors = [(torch.float64, 1e-12 * two_norms)]
        if two_norms < 1e37:  # float32 holds them
            # in any order of summation x.y is off by dim 2^-24 |x| |y| at most; the rest is a few more roundings
            error = (dim + 32) * 2.0**-24 * two_norms + dim * torch.finfo(torch.float32).tiny
            self.errors.insert(0, (torch.float32, error))

    def _parts(self, points: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first index, a block of points on the device)."""
        for start in range(0, len(points), self.side):
            yield start, points[start : start + self.side].to(self.device)

    def _centred(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.double() - self.center if dtype == torch.float64 else (x - self.center).to(dtype)

    def blocks(self, a: Tensor, b: Tensor) -> Iterator[_Block]:
        dtype = self.errors[0][0]
        for i, x in self._parts(a):
            centred = self._centred(x, dtype)
            for j, y in self._parts(b):
                rough = _squared(centred, self._centred(y, dtype))
                yield _Block(slice(i, i + len(x)), slice(j, j + len(y)), x, y, rough)

    def compare(self, block: _Block, radius: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C) flags each: squared distance <= radius, squared distance < radius. radius: (R, 1) or (1, C)
        float64."""
        radius, rough = radius.to(self.device), block.rough
        for dtype, error in self.errors:
            if dtype != rough.dtype:
                rough = _squared(*(self._centred(x, dtype) for x in (block.x, block.y)))
            strictly = rough < (radius - error).to(dtype)
            doubtful = (rough <= (radius + error).to(dtype)) ^ strictly
            if int(doubtful.count_nonzero()) <= MANY * doubtful.numel():
                open_pairs = doubtful.nonzero(as_tuple=True)
                exact, limit = self._exact(block.x, block.y, *open_pairs), radius.expand_as(doubtful)[open_pairs]
                inside = strictly.index_put(open_pairs, exact <= limit * (1 + TIE))
                return inside, strictly.index_put_(open_pairs, exact < limit * (1 - TIE))
        # copies of a sample everywhere: what is left of their distance is rounding
        rough.masked_fill_(rough < error, 0)
        return rough <= radius * (1 + TIE), rough < radius * (1 - TIE)

    def _exact(self, a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """(P,) float64 squared distances of the pairs a[i], b[j]."""
        found = torch.empty(len(i), dtype=torch.float64, device=self.device)
        for start in range(0, len(i), max(1, self.side // 4)):
            part = slice(start, start + max(1, self.side // 4))
            one, two = (x[at.to(x.device)].to(self.device).double() for x, at in ((a, i[part]), (b, j[part])))
            found[part] = one.sub_(two).square_().sum(1)
        return found

    def squared_radii(self, points: Tensor, k: int) -> Tensor:
        """(N,) float64 squared distance of every point to its k-th neighbour, itself excluded, on the CPU."""
        radii = torch.empty(len(points), dtype=torch.float64)
        for start in range(0, len(points), self.side):
            rows = torch.arange(start, min(start + self.side, len(points)))
            for dtype, error in self.errors:
                radii[rows], is_open = self._refined(points, rows, k, dtype, error)
                rows = rows[is_open]
                if not len(rows):
                    break
        return radii

    def _refined(self, points: Tensor, rows: Tensor, k: int, dtype: torch.dtype, error: float) -> tuple[Tensor, Tensor]:
        """Squared radii of these points from their neighbours in `dtype`, and (R,) flags: more points than were kept
        lie so near the k-th one that `dtype` does not tell which it is."""
        count = min(k + SPARE, len(points) - 1)
        rough, index = self._nearest(points, rows, count, dtype)
        rough = rough.double()
        kth = rough[:, k - 1 : k]
        # of a sorted list the k-th value moves by `error` at most if every value does
        nearer = rough < kth - 2 * error
        doubtful = (rough <= kth + 2 * error) & ~nearer
        exact = torch.where(nearer, -math.inf, math.inf).double()
        row, column = doubtful.nonzero(as_tuple=True)
        exact[row, column] = self._exact(points, points, rows.to(self.device)[row], index[row, column])
        is_open = doubtful[:, -1] & (count < len(points) - 1)
        return exact.sort(1).values[:, k - 1].cpu(), is_open.cpu()

    def _nearest(self, points: Tensor, rows: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(R, count) squared distances from points[rows] to their nearest points, themselves excluded, in order, and
        the indices of those."""
        x, rows = self._centred(points[rows].to(self.device), dtype), rows.to(self.device)
        nearest, index = x.new_empty(len(x), 0), rows.new_empty(len(x), 0)
        for start, y in self._parts(points):
            squared = _squared(x, self._centred(y, dtype))
            own = ((rows >= start) & (rows < start + len(y))).nonzero()[:, 0]
            squared[own, rows[own] - start] = math.inf
            found = squared.topk(min(count, len(y)), largest=False)
            nearest, index = torch.cat([nearest, found.values], 1), torch.cat([index, found.indices + start], 1)
            nearest, order = nearest.topk(min(count, nearest.shape[1]), largest=False)
            index = index.gather(1, order)
        return nearest, index


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """(R, C) squared distances by |x|^2 + |y|^2 - 2 x.y; rounding may leave those of equal points below 0."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)[None]
    return torch.addmm(norms, x, y.T, alpha=-2, out=norms)
