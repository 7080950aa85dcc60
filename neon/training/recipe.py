"""[train], [finetune] and [autoencoder]: recipes of the one training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from neon.binding import at_least
from neon.runtime.precision import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One recipe for `neon train` and the short fine-tune on S. Budgets are counted in images seen, as in the paper."""

    images: int
    """Budget B in images."""
    batch: int
    """Global batch: over all ranks and accumulation rounds."""
    lr: float
    micro_batch: int | None = None
    """Images per backward pass and rank; None: the rank's whole share. Changes memory and speed, not the update."""
    seed: int = 0
    optimizer: Literal["adam", "adamw"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    lr_ramp_images: int = 0
    """Linear warm-up from 0 over this many images (the first update has rate 0); may be longer than the budget."""
    lr_cosine_images: int = 0
    """Cosine decay to 0 over the last this many images of the budget."""
    ema_decay: float | None = None
    """Exponential moving average with a constant decay per update."""
    ema_halflife_images: float | None = None
    """... with a half-life in images."""
    ema_rampup_ratio: float | None = None
    """Half-life at most this fraction of the images seen so far (EDM trains with 0.05, fine-tunes without)."""
    ema_power: float | None = None
    """... with the power function profile (1 - 1/t)^(power + 1) of Karras et al. 2024 (arXiv 2312.02696)."""
    clean_gradients: bool = False
    """Replace nan by 0 and infinities by +-1e5 in gradients (EDM) instead of stopping."""
    max_grad_norm: float | None = None
    loss_scale: float = 1.0
    precision: Precision = "fp32"
    channels_last: bool = False
    snapshot_images: int | None = None
    """Write a snapshot at the first update at or after every multiple; the last update always gives one."""
    arch: Mapping[str, object] = field(default_factory=dict)
    """Constructor arguments that replace the checkpoint's, for example dropout."""
    objective: object = None
    """The family's own loss options (a `Family.objective`)."""

    def __post_init__(self) -> None:
        at_least(1, images=self.images, batch=self.batch)
        if self.micro_batch is not None:
            at_least(1, micro_batch=self.micro_batch)
        if self.snapshot_images is not None:
            at_least(1, snapshot_images=self.snapshot_images)
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")
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
    held_out: int = 1000
    """The last this many images are never trained on; the reported PSNR is theirs."""

    def __post_init__(self) -> None:
        at_least(1, held_out=self.held_out)
