"""The options of xAR's sampler ([sampling]), of its loss ([train.objective], [finetune.objective]) and of its
autoencoder's training ([autoencoder.train.objective])."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neon.config_table import Count, Fraction, NotNegative, check_fields

Solver = Literal["sde", "ode"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How latents are drawn."""

    num_steps: Count
    """Steps per cell; 4 num_steps + 3 network calls per image. Published: 40 (xar_base), 50 (xar_large)."""
    cfg_scale: float = 1.0
    """Guidance of the last cell, rising linearly from 1 at the first; 1 or less means none."""
    solver: Solver = "sde"
    """sde: the published Euler-Maruyama; ode: Euler on the probability flow, no noise after the start."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.solver == "sde" and self.num_steps < 2:
            raise ValueError(
                f"the stochastic sampler needs num_steps >= 2 (one with noise, the last without), got {self.num_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The defaults are the published recipe."""

    dropout: Fraction = 0.1
    """Of attention weights, of the attention's output and inside the MLP."""
    label_drop: Fraction = 0.1
    """Share of images trained with the null label, which guidance needs."""
    flip: Fraction = 0.5
    """Share of stored images that are mirrored. Sampled latents (synth.store = "codes") never are: the mirror image of
    a latent is not the latent of the mirror image."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class AutoencoderObjective:
    """Options of training the autoencoder (xar/trainable_autoencoder.py)."""

    kl_weight: NotNegative = 1e-6
    """Weight of the KL divergence beside the absolute error, both summed over an image."""

    def __post_init__(self) -> None:
        check_fields(self)
