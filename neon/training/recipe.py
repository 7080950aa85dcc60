"""[train], [finetune] and [autoencoder]: recipes of the one training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from neon.config_table import Count, Positive, Range, Seed, check_fields
from neon.runtime.precision import Precision

Decay = Annotated[float, Range(least=0, below=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One recipe for `neon train` and the short fine-tune on S. Budgets are counted in images seen, as in the paper."""

    images: Count
    """Budget B in images."""
    batch: Count
    """Global batch: over all ranks and accumulation rounds."""
    lr: Annotated[float, Range(above=0, most=1e6)]
    micro_batch: Count | None = None
    """Images per backward pass and rank; None: the rank's whole share. Changes memory and speed, not the update."""
    seed: Seed = 0
    optimizer: Literal["adam", "adamw"] = "adam"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[float, Range(above=0, most=1e6)] = 1e-8
    weight_decay: Annotated[float, Range(least=0, most=1e6)] = 0.0
    lr_ramp_images: Annotated[int, Range(least=0)] = 0
    """Linear warm-up from 0 over this many images (the first update has rate 0); may be longer than the budget."""
    lr_cosine_images: Annotated[int, Range(least=0)] = 0
    """Cosine decay to 0 over the last this many images of the budget."""
    ema_decay: Decay | None = None
    """Exponential moving average with a constant decay per update."""
    ema_halflife_images: Positive | None = None
    """... with a half-life in images."""
    ema_rampup_ratio: Positive | None = None
    """Half-life at most this fraction of the images seen so far (EDM trains with 0.05, fine-tunes without)."""
    ema_power: Positive | None = None
    """... with the power function profile (1 - 1/t)^(power + 1) of Karras et al. 2024 (arXiv 2312.02696)."""
    clean_gradients: bool = False
    """Replace nan by 0 and infinities by +-1e5 in gradients (EDM) instead of stopping."""
    max_grad_norm: Positive | None = None
    loss_scale: Positive = 1.0
    precision: Precision = "fp32"
    channels_last: bool = False
    snapshot_images: Count | None = None
    """Write a snapshot at the first update at or after every multiple; the last update always gives one."""
    arch: Mapping[str, object] = field(default_factory=dict)
    """Constructor arguments that replace the checkpoint's, for example dropout."""
    objective: object = None
    """The family's own loss options (a `Family.objective`)."""

    def __post_init__(self) -> None:
        check_fields(self)
        chosen = [name for name in ("ema_decay", "ema_halflife_images", "ema_power") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"choose one moving average, got {' and '.join(chosen)}")
        if self.ema_rampup_ratio is not None and self.ema_halflife_images is None:
            raise ValueError("ema_rampup_ratio limits a half-life: it needs ema_halflife_images")

    @property
    def has_ema(self) -> bool:
        return not (self.ema_decay is None and self.ema_halflife_images is None and self.ema_power is None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Autoencoder:
    """`neon train-autoencoder`: the family's autoencoder, from the images of [data]."""

    arch: Mapping[str, object]
    """Constructor arguments of the autoencoder."""
    train: Training
    held_out: Count = 1000
    """The last this many images are never trained on; the reported PSNR is theirs."""

    def __post_init__(self) -> None:
        check_fields(self)
