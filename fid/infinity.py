"""FID at infinitely many images: the finite-sample bias extrapolated away, with an error bar."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fid.frechet import Gaussian, frechet_distance
from fid.moments import Moments


class Extrapolated(NamedTuple):
    """value: the distance extrapolated to infinitely many generated images. error: its standard error from the choice
    of the images, by the jackknife. sizes, distances: the points of the fit."""

    value: float
    error: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


PARTS = (1, 2, 3, 4)
GROUPS = 10


def check_size(num_images: int, groups: int = GROUPS) -> None:
    """Raise ValueError if there are too few images for the extrapolation."""
    if num_images // groups < 2 or num_images * (groups - 1) // groups < 2 * PARTS[-1]:
        raise ValueError(f"extrapolation with {groups} groups needs more than {num_images} images")


def frechet_infinity(
    *,
    generated: Tensor,
    reference: Gaussian,
    groups: int = GROUPS,
    seed: int = 0,
) -> Extrapolated:
    """Frechet distance at N = infinity: the intercept of a straight line through (1/n, FD_n)  (Chong and Forsyth 2020).

    generated: features (N, D) in any order. The bias of FD_n is c/n to first order; n runs over N/1, N/2, N/3, N/4,
    and FD_n is the mean over that many disjoint parts, so every point uses every image. The error bar repeats the fit
    with each of `groups` random tenths left out (delete-a-group jackknife). The bias of a finite reference set stays
    in. n should be well above D. Raises ValueError if a part would have fewer than 2 images.
    """
    check_size(len(generated), groups)
    order = torch.randperm(len(generated), generator=torch.Generator().manual_seed(seed))
    chunks = order.chunk(groups)

    def distance(index: Tensor) -> float:
        moments = Moments(generated.shape[1])
        for part in index.split(4096):
            moments.update(generated[part])
        return frechet_distance(generated=moments.gaussian(), reference=reference)

    def curve(index: Tensor) -> Tensor:
        return torch.tensor([sum(map(distance, index.chunk(parts))) / parts for parts in PARTS], dtype=torch.float64)

    full = curve(order)
    left_out = [_intercept(curve(torch.cat([c for c in chunks if c is not chunk]))) for chunk in chunks]
    spread = torch.stack(left_out).var(correction=0) * (len(chunks) - 1)
    sizes = tuple(len(generated) // parts for parts in PARTS)
    return Extrapolated(_intercept(full).item(), spread.sqrt().item(), sizes, tuple(full.tolist()))


def _intercept(distances: Tensor) -> Tensor:
    """Of the least-squares line through (parts, distance): parts is proportional to 1/n, and 0 parts means infinitely
    many images."""
    x = torch.tensor(PARTS, dtype=torch.float64)
    slope = ((x - x.mean()) * distances).sum() / (x - x.mean()).square().sum()
    return distances.mean() - slope * x.mean()
