"""The experiments of the notebook: train, self-train, merge at many w."""

# R replicas, N points, W values of w

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neon.merge import RandomDirection, reverse_merge
from neon.toy.autoregressive import Autoregressive
from neon.toy.diffusion import Diffusion
from neon.toy.stack import Weights, num_replicas, repeat, split, stack
from neon.toy.target import distance

Model = Diffusion | Autoregressive
BATCH = 250
NUM_EVALUATED = 20_000
CHUNK = 2_000
"""Points sampled at a time, so that a layer's activations stay in the processor's cache."""


def optimise(
    model: Model,
    weights: Weights,
    points_RN2: Tensor,
    lr: Callable[[int], float],
    *,
    snapshots: Sequence[int],
    seed: int,
) -> dict[int, Weights]:
    """Adam on random batches of every replica's own points; the weights after each of `snapshots` steps.

    lr: learning rate of step 1, 2, ...
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=lr(1))
    taken = {}
    for step in range(1, max(snapshots) + 1):
        loss = model.loss(weights, batch_of(points_RN2, generator), generator).sum()  # replicas do not share a weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr(step)
        optimizer.step()
        if step in snapshots:
            taken[step] = {name: value.detach().clone() for name, value in weights.items()}
    return taken


def batch_of(points_RN2: Tensor, generator: torch.Generator) -> Tensor:
    index = torch.randint(points_RN2.shape[1], (points_RN2.shape[0], BATCH, 1), generator=generator)
    return points_RN2.gather(1, index.expand(-1, -1, 2))


def train_base(model: Model, points_RN2: Tensor, *, steps: int, lr: float, seed: int) -> Weights:
    """One base model per replica, from scratch, on its own points; the learning rate falls to 0 along a cosine."""
    fresh = model.fresh(points_RN2.shape[0], torch.Generator().manual_seed(seed))
    return optimise(
        model,
        fresh,
        points_RN2,
        lambda step: lr * (1 + math.cos(math.pi * step / steps)) / 2,
        snapshots=[steps],
        seed=seed + 1,
    )[steps]


def fine_tune(
    model: Model, base: Weights, points_RN2: Tensor, *, budgets: Sequence[int], lr: float, seed: int
) -> dict[int, Weights]:
    """Short training from `base` with a constant learning rate; one result per budget (in steps)."""
    return optimise(model, base, points_RN2, lambda _: lr, snapshots=budgets, seed=seed)


def self_train(
    model: Model,
    base: Weights,
    knobs: Sequence[float],
    *,
    num_synthetic: int,
    budgets: Sequence[int],
    lr: float,
    seed: int,
) -> dict[int, dict[float, Weights]]:
    """theta_syn for every budget and every setting of the sampler: draw S from the base, fine-tune the base on it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_replicas(base), num_synthetic, 2, generator=generator)
    synthetic = torch.cat([model.sample(base, noise, knob) for knob in knobs])
    tuned = fine_tune(model, repeat(base, len(knobs)), synthetic, budgets=budgets, lr=lr, seed=seed + 1)
    return {budget: dict(zip(knobs, split(weights, len(knobs)), strict=True)) for budget, weights in tuned.items()}


def random_control(base: Weights, tuned: Weights, *, seed: int) -> Weights:
    """In place of theta_syn: the same distance from the base in every tensor, in a random direction, per replica."""
    count = num_replicas(base)
    pairs = zip(split(base, count), split(tuned, count), strict=True)
    return stack([dict(RandomDirection(b, s, list(b), seed + replica)) for replica, (b, s) in enumerate(pairs)])


def evaluation_noise(num_points: int = NUM_EVALUATED, *, seed: int) -> Tensor:
    """(1, N, 2): the common random numbers, from which every model that is compared draws its samples."""
    return torch.randn(1, num_points, 2, generator=torch.Generator().manual_seed(seed))


def score(model: Model, weights: Weights, noise_1N2: Tensor) -> Tensor:
    """Distance to the target of the ordinary sampler's points, (R,)."""
    chunks = noise_1N2.expand(num_replicas(weights), -1, -1).split(CHUNK, dim=1)
    return distance(torch.cat([model.sample(weights, chunk) for chunk in chunks], dim=1))


@dataclass(frozen=True)
class Curve:
    """Distance to the target against w: ws (W,), values (W, R), each of num_points points."""

    ws: Tensor
    values: Tensor
    num_points: int

    @property
    def mean(self) -> Tensor:
        return self.values.mean(dim=1)

    def parabola(self, values: Tensor) -> tuple[float, float, float]:
        """(a, b, c) of a w^2 + b w + c, least squares through the lowest of `values` (W,) and two neighbours on either
        side.

        Raises ValueError if the lowest value is the first or the last one.
        """
        lowest = int(values.argmin())
        if lowest in (0, len(self.ws) - 1):
            raise ValueError(
                f"the lowest distance is at the end of the range, w = {self.ws[lowest]:.3g}: widen the range of w"
            )
        near = slice(max(lowest - 2, 0), lowest + 3)
        w = self.ws[near].double()
        a, b, c = (
            torch.linalg.lstsq(torch.stack([w**2, w, torch.ones_like(w)], dim=1), values[near].double()[:, None])
            .solution[:, 0]
            .tolist()
        )
        return a, b, c

    def best_w(self) -> Tensor:
        """w* of every replica, (R,): the vertex of its parabola."""
        fits = [self.parabola(values) for values in self.values.T]
        return torch.tensor([-b / (2 * a) for a, b, _ in fits])

    def at(self, w: float) -> float:
        """The mean distance at a w of the grid."""
        return self.mean[int((self.ws - w).abs().argmin())].item()

    def lowest(self) -> float:
        """The lowest measured mean distance: one w for all replicas."""
        return self.mean.min().item()


def w_grid(highest: float) -> Tensor:
    """21 equally spaced values of w from -highest to highest; 0 is exactly among them."""
    return torch.arange(-10, 11) * (highest / 10)


def sweep(model: Model, base: Weights, tuned: Weights, ws: Tensor, noise_1N2: Tensor) -> Curve:
    """The distance of reverse_merge(base, tuned, w) for every w, with common random numbers."""
    values = torch.stack([score(model, reverse_merge(base, tuned, w), noise_1N2) for w in ws.tolist()])
    return Curve(ws, values, noise_1N2.shape[1])


def minima_table(model: Model, curves: Mapping[int, Mapping[float, Curve]]) -> str:
    """Markdown: one row per budget and sampler; w* as mean and standard deviation over the replicas."""
    rows = [
        f"| steps | {model.knob} of S | base FD (w = 0) | w* | lowest FD | base / lowest |",
        "|---|---|---|---|---|---|",
    ]
    for budget, by_knob in curves.items():
        for knob, curve in by_knob.items():
            w, base, lowest = curve.best_w(), curve.at(0), curve.lowest()
            rows.append(
                f"| {budget} | {knob:g} | {base:.3f} | {w.mean():+.2f} +- {w.std():.2f} | {lowest:.3f} | "
                f"{base / lowest:.1f} x |"
            )
    return "\n".join(rows)


def plane(
    model: Model, base: Weights, synth: Weights, other: Weights, ws: Tensor, wo: Tensor, noise_1N2: Tensor
) -> Tensor:
    """Mean distance at base + w_s (base - synth) + w_o (other - base), (len(wo), len(ws)): Figure 2 of arXiv
    2510.03597."""
    rows = []
    for w_o in wo.tolist():
        towards = reverse_merge(base, other, -w_o)
        away = [reverse_merge(base, synth, w_s) for w_s in ws.tolist()]
        points = [{name: towards[name] + merged[name] - base[name] for name in base} for merged in away]
        rows.append(torch.stack([score(model, weights, noise_1N2).mean() for weights in points]))
    return torch.stack(rows)
