"""Integrate dx/dt = v(t, x) from noise at t = 0 to data at t = 1: Euler, and the adaptive method of Dormand and Prince.

dopri5 follows torchdiffeq, by which the published numbers were made: Shampine's error weights, steps that are not cut
at the end (the network is called beyond t = 1, and the result is the last step's interpolant at 1), and an error norm
over the whole batch, which couples its images. Our default is the norm per image: each image has steps of its own and
does not depend on its batch. G groups have steps of their own: the images of the batch, or the batch as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flow.options import ErrorNorm
from neon.quantize import DivergedError

Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(t (B,) or (), x (B, ...), class labels (B,) or None) -> dx/dt like x."""
Field = Callable[[Tensor, Tensor], Tensor]
"""(t (G,) float64, y (G, N)) -> dy/dt like y."""

NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""Dormand and Prince 1980. The last row is the fifth-order result: its slope is the first one of the next step."""
FOURTH_ORDER = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
ERROR = tuple(fifth - fourth for fifth, fourth in zip((*STAGES[-1], 0.0), FOURTH_ORDER, strict=True))
"""Shampine's embedded formula, as torchdiffeq has it."""
MIDPOINT = tuple(
    numerator / denominator / 2
    for numerator, denominator in (
        (6025192743, 30085553152),
        (0, 1),
        (51252292925, 65400821598),
        (-2691868925, 45128329728),
        (187940372067, 1594534317056),
        (-1776094331, 19743644256),
        (11237099, 235043384),
    )
)
"""Weights of the slopes for the state in the middle of a step (Shampine 1986), of which the quartic interpolant is
made."""


def euler(velocity: Velocity, x: Tensor, labels: Tensor | None, times: Tensor) -> list[Tensor]:
    """The states at `times` (N + 1,), x itself first. N calls, at the beginning of each step."""
    states, t = [x], times[0]
    for end in times[1:]:
        dt = end - t  # from the accumulated time, as published: it corrects its own rounding
        states.append(states[-1] + dt * velocity(t, states[-1], labels))
        t = t + dt
    return states


def dopri5(
    velocity: Velocity,
    x: Tensor,
    labels: Tensor | None,
    times: Sequence[float],
    *,
    tol: float,
    error_norm: ErrorNorm = "image",
) -> Tensor:
    """The states (T, B, ...) at `times`, ascending, of which the first is x. 2 + 6 (accepted + rejected steps) calls.

    tol: relative and absolute tolerance. Raises DivergedError if the velocity is not finite or steps vanish.
    """
    groups = len(x) if error_norm == "image" else 1
    images = torch.arange(len(x), device=x.device).view(groups, -1)
    y, left = x.reshape(groups, -1), torch.arange(groups, device=x.device)  # groups that have not reached the last time

    def field(t: Tensor, y: Tensor) -> Tensor:
        there = images[left].flatten()
        when = t.to(y.dtype).repeat_interleave(images.shape[1])
        return (
            velocity(when, y.reshape(len(there), *x.shape[1:]), None if labels is None else labels[there])
            .reshape(y.shape)
            .to(y.dtype)
        )

    found = y.new_empty(len(times), *y.shape)
    found[0] = y
    t = torch.full((groups,), times[0], dtype=torch.float64, device=x.device)
    slope = field(t, y)
    h = first_step(field, t, y, slope, tol)
    while len(left):
        slopes, y_new = stages(field, t, h, y, slope)
        ratio = rms(combined(slopes, ERROR, h) / (tol + tol * torch.maximum(y.abs(), y_new.abs()))).double()
        t_new = t + h
        if not ratio.isfinite().all() or (t_new == t).any():
            raise DivergedError(
                f"dopri5 stops at t = {t.min():.4g}: the velocity is not finite, or the tolerance {tol:g} is too small"
            )
        accepted = ratio <= 1
        for k, time in enumerate(times[1:], 1):
            hit = accepted & (t < time) & (time <= t_new)
            if hit.any():
                step = [part[hit] for part in (y, y_new, slopes[0], slopes[-1], combined(slopes, MIDPOINT, h))]
                found[k, left[hit]] = interpolated(((time - t) / h)[hit], h[hit], *step)
        t = torch.where(accepted, t_new, t)
        y, slope = (torch.where(accepted[:, None], new, old) for new, old in ((y_new, y), (slopes[-1], slope)))
        h = h * growth(ratio)
        going = t < times[-1]
        left, t, h, y, slope = left[going], t[going], h[going], y[going], slope[going]
    return found.view(len(times), *x.shape)


def first_step(field: Field, t: Tensor, y: Tensor, slope: Tensor, tol: float) -> Tensor:
    """Length (G,) float64 of the first step (Hairer, Norsett and Wanner 1993, II.4, for an error of order 5). One
    call."""
    scale = tol + y.abs() * tol
    d0, d1 = rms(y / scale), rms(slope / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    d2 = rms((field(t + h0, y + h0[:, None] * slope) - slope) / scale) / h0
    is_flat = (d1 <= 1e-15) & (d2 <= 1e-15)
    h1 = torch.where(is_flat, (h0 * 1e-3).clamp(min=1e-6), (0.01 / torch.maximum(d1, d2)) ** (1 / 5))
    return torch.minimum(100 * h0, h1).double()


def stages(field: Field, t: Tensor, h: Tensor, y: Tensor, slope: Tensor) -> tuple[list[Tensor], Tensor]:
    """The seven slopes of a step, and the state at its end."""
    slopes, end = [slope], y
    for node, weights in zip(NODES, STAGES, strict=True):
        end = y + combined(slopes, weights, h)
        when = (t + node * h).to(y.dtype)
        if node == 1:
            when = torch.nextafter(when, when - 1)  # as published: the step's own side of a jump at its end
        slopes.append(field(when.double(), end))
    return slopes, end


def combined(slopes: Sequence[Tensor], weights: Sequence[float], h: Tensor) -> Tensor:
    """h times the weighted sum of the slopes, (G, N)."""
    total = torch.zeros_like(slopes[0])
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            total = total + slope * (h * weight).to(slope.dtype)[:, None]
    return total


def growth(ratio: Tensor) -> Tensor:
    """Factor of the next step's length from error / tolerance: at most 10, at least 0.2, and an accepted step never
    shrinks it."""
    least = torch.where(ratio < 1, 1.0, 0.2).to(ratio.dtype)
    return torch.where(ratio == 0, 10.0, torch.maximum(0.9 * ratio ** (-1 / 5), least).clamp(max=10))


def interpolated(u: Tensor, h: Tensor, y0: Tensor, y1: Tensor, f0: Tensor, f1: Tensor, from_y0: Tensor) -> Tensor:
    """The quartic through both ends of a step, their slopes and the middle y0 + from_y0, at u (G,) in [0, 1]."""
    u, h = u.to(y0.dtype)[:, None], h.to(y0.dtype)[:, None]
    middle = y0 + from_y0
    quadratic = h * (f1 - 4 * f0) - 11 * y0 - 5 * y1 + 16 * middle
    cubic = h * (5 * f0 - 3 * f1) + 18 * y0 + 14 * y1 - 32 * middle
    quartic = 2 * h * (f1 - f0) - 8 * (y0 + y1) + 16 * middle
    return y0 + u * h * f0 + u**2 * quadratic + u**3 * cubic + u**4 * quartic


def rms(y: Tensor) -> Tensor:
    """(G, N) -> (G,) root mean square."""
    return y.square().mean(1).sqrt()
