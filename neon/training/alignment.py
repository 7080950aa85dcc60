"""Does a step away from one's own samples help, and in which direction? The paper's alignment, measured.

s = <r_data, P r_syn>: the gradients of the loss on real and on synthetic images at the base, in the metric of the
fine-tune's Adam. A short fine-tune moves the weights by -alpha P r_syn, so the merge changes the loss on real images by

    w alpha s + (w alpha)^2 z / 2 + ...,   z = d' H d, d = P r_syn      (arXiv 2510.03597, section 3.1)

s < 0: w > 0 helps; s > 0: w < 0 does; best w* = -s / (alpha z).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Gradients = Callable[[int, Mapping[str, Tensor] | None], dict[str, Tensor]]
"""(k, offset) -> gradient of the mean loss of batch k at the base, or at base + offset, by parameter."""
NUM_DRAWS = 2_000
NEAR_BASE = 0.1
"""A predicted |w| below it says that the loss has its minimum at the base; the distance of the samples may not."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """s with its 95 % interval (bootstrap over batches of images), the cosine, and what they predict."""

    s: float
    low: float
    high: float
    cosine: float
    """s over the norms of both gradients in the metric; the norms hold the noise of the batches, so it is small."""
    curvature: float
    """z: of the loss on real images along P r_syn."""
    alpha: float
    """Length of the fine-tune's step in units of P r_syn."""

    @property
    def sign(self) -> int:
        """Of the w that helps: 1, -1, or 0 where the interval holds both."""
        return 1 if self.high < 0 else -1 if self.low > 0 else 0

    @property
    def best_w(self) -> float | None:
        """Predicted from loss and curvature; None where the loss does not curve upwards along the step."""
        return -self.s / (self.alpha * self.curvature) if self.curvature > 0 and self.alpha > 0 else None

    def sentence(self) -> str:
        """What it means, for a person."""
        interval = f"s = {self.s:.3g}, 95 % interval {self.low:.3g} .. {self.high:.3g}, cosine {self.cosine:+.3f}"
        if self.sign == 0:
            return f"undecided: {interval} holds both signs. Use more images, or search w on both sides of 0"
        where = "" if self.best_w is None else f"; by the loss alone the best w is about {self.best_w:.2g}"
        if self.best_w is not None and abs(self.best_w) < NEAR_BASE:
            where += ": the loss is least near the base, where the samples need not be best, so search both signs"
        if self.sign > 0:
            return f"w > 0 should help: training on the samples would raise the loss on real images ({interval}){where}"
        return f"w < 0 should help: training on the samples also lowers the loss on real images ({interval}){where}"


def align(
    real: Gradients,
    synth: Gradients,
    num_batches: int,
    *,
    beta2: float = 0.999,
    eps: float = 1e-8,
    alpha: Callable[[Mapping[str, Tensor]], float],
) -> Alignment:
    """Three passes over the synthetic and real batches and one more for the curvature; three copies of the weights.

    alpha: the fine-tune's length, given d = P r_syn. Raises ValueError for fewer than 4 batches.
    """
    if num_batches < 4:
        raise ValueError(f"an interval needs at least 4 batches, got {num_batches}")
    mean, second = _mean_and_second_moment(synth, num_batches, beta2)
    metric = {name: 1 / (value.sqrt() + eps) for name, value in second.items()}
    direction = {name: metric[name] * mean[name] for name in mean}
    towards, real_mean = torch.empty(num_batches, dtype=torch.float64), None
    for k in range(num_batches):
        gradient = real(k, None)
        towards[k] = inner(gradient, direction)
        real_mean = gradient if real_mean is None else {n: real_mean[n] + gradient[n] for n in gradient}
    assert real_mean is not None
    real_mean = {name: value / num_batches for name, value in real_mean.items()}
    weighted = {name: metric[name] * real_mean[name] for name in real_mean}
    back = torch.tensor([inner(synth(k, None), weighted) for k in range(num_batches)], dtype=torch.float64)
    s = float(towards.mean())
    low, high = _interval(s, towards, back)
    norms = inner(real_mean, weighted) * inner(mean, direction)
    length = alpha(direction)
    return Alignment(
        s=s,
        low=low,
        high=high,
        cosine=s / math.sqrt(norms) if norms > 0 else 0.0,
        curvature=_curvature(real, direction, length or 1e-3, num_batches),
        alpha=length,
    )


def num_gradients(num_batches: int) -> int:
    """How many batch gradients `align` asks for."""
    return 3 * num_batches + 2 * _few(num_batches)


def _few(num_batches: int) -> int:
    """Of the batches, those that the curvature is measured on."""
    return max(1, num_batches // 4)


def _mean_and_second_moment(
    gradients: Gradients, num_batches: int, beta2: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the batches' gradients: the mean, and Adam's bias-corrected moving average of the squares."""
    mean: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for k in range(num_batches):
        for name, gradient in gradients(k, None).items():
            mean[name] = mean.get(name, torch.zeros_like(gradient)) + gradient / num_batches
            second[name] = beta2 * second.get(name, torch.zeros_like(gradient)) + (1 - beta2) * gradient.square()
    return mean, {name: value / (1 - beta2**num_batches) for name, value in second.items()}


def _interval(s: float, towards: Tensor, back: Tensor) -> tuple[float, float]:
    """95 % bootstrap interval of s = <r_data, P r_syn>, both sets of batches drawn again.

    towards: <real batch, P r_syn>, back: <r_data, P synthetic batch>, (K,) each; both have the mean s.
    """
    generator = torch.Generator().manual_seed(0)
    draws = -s * torch.ones(NUM_DRAWS, dtype=torch.float64)
    for values in (towards, back):
        draws += values[torch.randint(len(values), (NUM_DRAWS, len(values)), generator=generator)].mean(1)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _curvature(real: Gradients, direction: Mapping[str, Tensor], step: float, num_batches: int) -> float:
    """d' H d by the difference of the slopes at base + step d and base - step d, on a quarter of the batches."""
    slopes = []
    for sign in (1, -1):
        offset = {name: sign * step * value for name, value in direction.items()}
        few = range(_few(num_batches))
        slopes.append(sum(inner(real(k, offset), direction) for k in few) / len(few))
    return (slopes[0] - slopes[1]) / (2 * step)


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))
