"""The options of VAR's sampler ([sampling]), of its loss ([train.objective], [finetune.objective]) and of its
tokeniser's training ([autoencoder.train.objective])."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from neon.config_table import ADDED, Fraction, NotNegative, Positive, Range, check_fields


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The defaults are those of the published Neon rows except cfg_scale, which belongs to the row."""

    cfg_scale: NotNegative = 1.5
    """w of (1 + w) conditional - w unconditional at the last scale, growing linearly from 0 at the first."""
    top_k: Annotated[int, Range(least=0)] = 900
    """Keep the k likeliest tokens (0: all)."""
    top_p: Fraction = 0.95
    """Then keep the likeliest of those with this much probability (0: all)."""
    temperature: Positive = field(default=1.0, metadata=ADDED)
    """Divides the guided logits before top_k and top_p. Above 1 the sampler seeks diversity."""
    more_smooth: bool = False
    """Average codes by Gumbel-softmax weights instead of drawing one: prettier pictures, no tokens, not for numbers."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The defaults are the published recipe."""

    label_drop: Fraction = 0.1
    """Share of images trained as "no class", which guidance needs."""
    label_smoothing: Fraction = 0.0
    resize: Annotated[float, Range(least=1)] = 1.125
    """Stored images are enlarged by this factor, then cropped back at random. Tokens (synth.store = "codes") never
    are."""
    flip: Fraction = 0.0
    """Share of stored images that are mirrored."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class AutoencoderObjective:
    """Options of training the tokeniser (var/trainable_autoencoder.py)."""

    commitment: NotNegative = 0.25
    """Weight (beta) of the pull of the encoder's features towards their codes."""

    def __post_init__(self) -> None:
        check_fields(self)
