"""Flow matching with noisy-context learning: every cell of an image has its own time (xAR, arXiv 2502.20388, section
3)."""

from __future__ import annotations

from torch import Tensor

from xar.cells import to_cells
from xar.transformer import XARTransformer

TIMESTEPS = 1000


def timesteps(times: Tensor) -> Tensor:
    """The integers that the time embedding takes: times in [0, 1], truncated to thousandths in float32, as in the
    published training.

    In float64 some products land on the other side of an integer (for example one of the five steps of a 5-step grid).
    """
    return (times.float() * TIMESTEPS).long()


def interpolate(cells: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """x_t = (1 - t) data + t noise. cells, noise: (B, 4, 64, 16); times: (B, 4) in [0, 1], 1 = noise."""
    times = times[..., None, None]
    return (1 - times) * cells + times * noise


def velocity_loss(
    model: XARTransformer, latents: Tensor, labels: Tensor, *, times: Tensor, noise: Tensor, dropout: float = 0.0
) -> Tensor:
    """Mean of (v - (noise - data))^2 over the tokens of each image, (B,) float32.

    latents: (B, 16, 16, 16), scaled; labels: (B,) with the null label where it was dropped; times (B, 4); noise (B,
        4, 64, 16).
    """
    cells = to_cells(latents)
    velocity = model(interpolate(cells, noise, times), timesteps(times), labels, dropout=dropout)
    return (velocity.float() - (noise - cells)).square().mean(dim=(1, 2, 3))
