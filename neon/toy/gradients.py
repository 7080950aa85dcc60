"""Why Neon works: the angle between the gradient on synthetic points and the gradients that would improve the model."""

# R replicas, N points, K settings of the sampler's knob

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from neon.toy.diffusion import Diffusion
from neon.toy.experiment import CHUNK, Model, batch_of
from neon.toy.stack import Weights, num_replicas
from neon.toy.target import distance, real_points


@dataclass(frozen=True)
class Alignment:
    """Cosines in Adam's metric of the gradient on synthetic points with two others; negative means that w > 0 helps.

    Section 3.1 of arXiv 2510.03597; there the other gradient is that of the loss.
    """

    knobs: Sequence[float]
    """Settings of the sampler that drew the synthetic points, (K,)."""
    loss: Tensor
    """With the gradient of the loss on real points, (K, R)."""
    score: Tensor
    """With the gradient of the distance between the ordinary sampler's points and the target, (K, R)."""


def alignment(model: Model, base: Weights, knobs: Sequence[float], *, num_points: int, seed: int) -> Alignment:
    """Both cosines at the base, from `num_points` fresh real, synthetic and ordinary points.

    The gradients on real and on synthetic points draw their own times and noises: shared ones would make them look
    aligned where both are small.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    real = real_points(num_replicas(base), num_points, seed=seed)
    noise, other_noise = (torch.randn(real.shape, generator=generator) for _ in range(2))
    metric = adam_metric(model, base, real, generator)
    of_loss, of_score = gradient(model, base, real, seed=seed), score_gradient(model, base, other_noise)
    cosines = []
    for knob in knobs:
        synthetic = gradient(model, base, model.sample(base, noise, knob), seed=seed + 1)
        cosines.append(torch.stack([cosine(metric, synthetic, other) for other in (of_loss, of_score)]))
    loss, score = torch.stack(cosines, dim=1)
    return Alignment(knobs, loss, score)


def gradient(model: Model, weights: Weights, points_RN2: Tensor, *, seed: int, passes: int = 8) -> Weights:
    """Gradient of the loss, averaged over `passes` draws of the loss's own randomness for every point."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
    passes = passes if isinstance(model, Diffusion) else 1  # an exact likelihood draws nothing
    for _ in range(passes):
        for chunk in points_RN2.split(CHUNK, dim=1):
            share = chunk.shape[1] / points_RN2.shape[1] / passes
            (share * model.loss(weights, chunk, generator).sum()).backward()
    return {name: value.grad for name, value in weights.items() if value.grad is not None}


def score_gradient(model: Model, weights: Weights, noise_RN2: Tensor) -> Weights:
    """Gradient of the distance to the target of the ordinary sampler's points, through all its steps."""
    weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
    distance(model.sample(weights, noise_RN2)).sum().backward()
    return {name: value.grad for name, value in weights.items() if value.grad is not None}


def adam_metric(
    model: Model, base: Weights, points_RN2: Tensor, generator: torch.Generator, *, num_batches: int = 100
) -> Weights:
    """P = 1 / (sqrt(v) + 1e-8), the factors by which Adam multiplies a gradient: v is its second moment at the base, on
    real batches (beta2 = 0.999, bias-corrected).
    """
    beta2, second = 0.999, {name: torch.zeros_like(value) for name, value in base.items()}
    for batch in range(num_batches):
        grads = gradient(model, base, batch_of(points_RN2, generator), seed=batch, passes=1)
        for name, grad in grads.items():
            second[name].lerp_(grad.square(), 1 - beta2)
    return {name: 1 / ((value / (1 - beta2**num_batches)).sqrt() + 1e-8) for name, value in second.items()}


def cosine(metric: Weights, a: Weights, b: Weights) -> Tensor:
    return inner(metric, a, b) / (inner(metric, a, a) * inner(metric, b, b)).sqrt()


def inner(metric: Weights, a: Weights, b: Weights) -> Tensor:
    """<a, P b> of every replica, (R,)."""
    products = ((metric[name] * a[name] * b[name]).double().flatten(1).sum(1) for name in metric)
    return reduce(add, products)
