"""Time grids and the two samplers of IMM: push x forward through a few times, or jump to data and add noise again.

Zhou et al. 2025 (arXiv 2503.07565), algorithms 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from imm.options import Sampling
from imm.schedule import Schedule
from neon.seeds import Rng

RHO = 7.0  # Karras et al. 2022, eq. 5
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Times(Protocol):
    """What a grid needs of a preconditioner."""

    schedule: Schedule
    T: float
    eps: float


class Net(Times, Protocol):
    """What a sampler needs of a preconditioner."""

    sigma_data: float

    def guided(self, x: Tensor, t: Tensor, s: Tensor, class_labels: Tensor | None, cfg_scale: float) -> Tensor:
        """x at s from x at t."""


def time_grid(net: Times, how: Sampling) -> Tensor:
    """(num_steps + 1,) times from net.T down to net.eps."""
    dtype = DTYPES[how.state]
    if how.grid == "explicit":
        return explicit_grid(net, how.mid_nt, dtype)
    return (uniform_grid if how.grid == "uniform" else edm_grid)(net, how.num_steps, dtype)


def uniform_grid(net: Times, num_steps: int, dtype: torch.dtype) -> Tensor:
    """(num_steps + 1,) equally spaced times from T down to eps."""
    _at_least_one(num_steps)
    return torch.linspace(net.T, net.eps, num_steps + 1, dtype=dtype)


def edm_grid(net: Times, num_steps: int, dtype: torch.dtype) -> Tensor:
    """(num_steps + 1,) times whose nt are spaced as EDM spaces sigma; the ends are T and eps up to rounding.

    In float32 the order of the operations is the published one: it moves t by 1e-6, which matters to the embedding of
    1000 t.
    """
    _at_least_one(num_steps)
    nt_max, nt_min = (net.schedule.log_nt(torch.tensor(t, dtype=dtype)).exp().item() for t in (net.T, net.eps))
    root_max, root_min = nt_max ** (1 / RHO), nt_min ** (1 / RHO)
    steps = torch.arange(num_steps + 1, dtype=dtype)
    grid = net.schedule.t_of_nt((root_max + steps / num_steps * (root_min - root_max)) ** RHO)
    if not (grid.diff() < 0).all():
        raise ValueError(
            f"grid = 'edm' needs a noise level at T, which is infinite at T = {net.T:g}: its times would be "
            f"{[round(t, 4) for t in grid.tolist()]}; take grid = 'uniform'"
        )
    return grid


def explicit_grid(net: Times, mid_nt: Sequence[float], dtype: torch.dtype) -> Tensor:
    """T, the times of the noise levels `mid_nt` (descending, sigma / alpha), eps. No levels: one step."""
    levels = torch.tensor(list(mid_nt), dtype=torch.float32)  # as in the published grids
    middle = net.schedule.t_of_nt(levels).to(dtype)
    grid = torch.cat([torch.tensor([net.T], dtype=dtype), middle, torch.tensor([net.eps], dtype=dtype)])
    if not (grid.diff() < 0).all():
        raise ValueError(
            f"mid_nt must decrease and lie between the noise levels of T and eps, got {list(mid_nt)}: times "
            f"{grid.tolist()}"
        )
    return grid


@torch.no_grad()
def pushforward(net: Net, x: Tensor, grid: Tensor, class_labels: Tensor | None, *, cfg_scale: float) -> Tensor:
    """Take x (B, C, H, W), noise of standard deviation sigma_data at grid[0], through the grid's times to the last.

    State and times are in the grid's dtype. len(grid) - 1 steps, each one network call (two images per image if
    guided).
    """
    x, grid = x.to(grid.dtype), grid.to(x.device)
    for t, s in pairwise(grid):
        x = net.guided(x, t, s, class_labels, cfg_scale)
    return x


@torch.no_grad()
def restart(net: Net, x: Tensor, grid: Tensor, class_labels: Tensor | None, rng: Rng, *, cfg_scale: float) -> Tensor:
    """As pushforward, but every step goes to eps; fresh noise then brings x to the grid's next time."""
    x, grid = x.to(grid.dtype), grid.to(x.device)
    eps = torch.tensor(net.eps, dtype=grid.dtype, device=x.device)
    fresh = (
        rng.normals(len(grid) - 2, x.shape[1:], dtype=x.dtype).to(x.device) * net.sigma_data
        if len(grid) > 2
        else x.new_empty(0)
    )
    for i, t in enumerate(grid[:-1]):
        if i > 0:
            x = net.schedule.add_noise(x, fresh[i - 1], t)
        x = net.guided(x, t, eps, class_labels, cfg_scale)
    return x


def _at_least_one(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
