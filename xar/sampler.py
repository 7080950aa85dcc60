"""Sampling cell by cell: each cell goes from noise to data, given the finished ones.

xAR (arXiv 2502.20388); the stochastic integrator is SiT's (arXiv 2401.08740) for x_t = (1 - t) data + t noise.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from neon.seeds import Rng
from xar.cells import CELL_TOKENS, CHANNELS, NUM_CELLS, from_cells
from xar.loss import timesteps
from xar.options import Solver
from xar.transformer import KeyValueCache, XARTransformer

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (B, 64, 16), time () in [0, 1]) -> noise - data, (B, 64, 16)."""
LAST_TIME = 0.04
"""The last step of the SDE, from here to 0, adds no noise: the score estimate divides by t."""


def time_grid(num_steps: int, solver: Solver) -> Tensor:
    """(num_steps + 1,) float64, from 1 (noise) to 0 (data).

    torch.linspace and not numpy's: they differ in the last bit, which changes truncated timesteps.
    """
    if solver == "ode":
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    if num_steps < 2:
        raise ValueError(
            f"the stochastic sampler needs num_steps >= 2 (one with noise, the last without), got {num_steps}"
        )
    return torch.cat(
        [torch.linspace(1, LAST_TIME, num_steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    )


def integrate_sde(velocity: Velocity, start: Tensor, noise: Tensor) -> Tensor:
    """Euler-Maruyama on dx = (v - w score / 2) dt + sqrt(w) dW with w(t) = 2t, from t = 1 to 0.04, then one step
    without noise.

    The score is ((t - 1) v - x) / t (SiT, eq. 9), so the drift is (2 - t) v + x.

    start: (B, 64, 16) unit normal. noise: (num_steps - 1, B, 64, 16) float64.
    Returns (B, 64, 16) float64: in float32 the sum over the steps loses digits.
    """
    times = time_grid(len(noise) + 1, "sde")
    x = start.double()
    for k, (time, time_next) in enumerate(pairwise(times)):
        drift = (2 - time) * velocity(x, time) + x
        x = x + drift * (time_next - time)
        if k < len(noise):  # the step from LAST_TIME to 0 adds none
            x = x + (2 * time * (time - time_next)).sqrt() * noise[k]
    return x


def integrate_ode(velocity: Velocity, start: Tensor, num_steps: int) -> Tensor:
    """Euler on dx = v dt from t = 1 to 0 in equal steps. Shapes as in `integrate_sde`."""
    times = time_grid(num_steps, "ode")
    x = start.double()
    for time, time_next in pairwise(times):
        x = x + velocity(x, time) * (time_next - time)
    return x


def cell_guidance(cfg_scale: float, cell: int) -> float:
    """The guidance of a cell: linear from 1 at the first to cfg_scale at the last. A cell with 1 or less is not
    guided."""
    return 1 + (cfg_scale - 1) * cell / (NUM_CELLS - 1)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    return unconditional + scale * (conditional - unconditional)


@torch.no_grad()
def sample_cells(
    model: XARTransformer, rng: Rng, labels: Tensor, *, num_steps: int, cfg_scale: float, solver: Solver = "sde"
) -> Tensor:
    """Latents (B, 16, 16, 16) float32 of `labels` (B,), in the scale of training.

    Per cell: num_steps network calls and, from the second cell on, one for the cell that was finished, at time 0.
    The calls of the first cell, and all calls if cfg_scale <= 1, are made without the unconditional half.

    The draws, cell by cell: float32 latents, then (SDE) the float64 noise of all its steps.
    """
    batch, is_guided = len(labels), cfg_scale > 1
    both = torch.cat([labels, torch.full_like(labels, model.num_classes)]) if is_guided else labels
    cache = model.new_cache(len(both))
    finished: list[Tensor] = []
    for cell in range(NUM_CELLS):
        if finished:
            _call(model, finished[-1].repeat(len(both) // batch, 1, 1), torch.zeros(()), both, cell - 1, cache)
        velocity = _velocity(model, both, cell, cell_guidance(cfg_scale, cell), cache, batch)
        start = rng.normal((CELL_TOKENS, CHANNELS))
        if solver == "sde":
            noise = rng.normals(num_steps - 1, (CELL_TOKENS, CHANNELS), torch.float64)
            finished.append(integrate_sde(velocity, start, noise).float())
        else:
            finished.append(integrate_ode(velocity, start, num_steps).float())
    return from_cells(torch.stack(finished, dim=1))


def _velocity(
    model: XARTransformer, labels: Tensor, cell: int, scale: float, cache: KeyValueCache, batch: int
) -> Velocity:
    """The velocity field of one cell in float64; `labels` may end with null labels, which scale = 1 does not use."""

    def conditional(x: Tensor, time: Tensor) -> Tensor:
        return _call(model, x, time, labels[:batch], cell, cache.rows(batch)).double()

    def with_guidance(x: Tensor, time: Tensor) -> Tensor:
        with_label, without = _call(model, x.repeat(2, 1, 1), time, labels, cell, cache).double().chunk(2)
        return guided(with_label, without, scale)

    return with_guidance if scale > 1 else conditional


def _call(model: XARTransformer, x: Tensor, time: Tensor, labels: Tensor, cell: int, cache: KeyValueCache) -> Tensor:
    """Velocity (B, 64, 16) of one cell; its keys and values are left in the cache."""
    steps = torch.full((len(x), 1), int(timesteps(time)), device=x.device)
    return model(x.float()[:, None], steps, labels, first_cell=cell, cache=cache)[:, 0]
