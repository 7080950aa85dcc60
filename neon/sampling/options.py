"""[sampling] and [synth]: how images are drawn, and the synthetic set S."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from neon import quantize
from neon.config_table import ADDED, Count, Range, Seed, check_fields
from neon.runtime.precision import Precision
from neon.runtime.speed import Speed
from neon.seeds import NUM_SEEDS

Labels = Literal["balanced", "drawn"]
"""balanced: image i has class i mod num_classes. drawn: from the image's own stream, as the family's published script
does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How images are drawn, shared by synth, select and report. The family's own options stand beside these keys."""

    uint8: Literal[quantize.Rule, "none"]
    """Rounding rule of neon/quantize.py. "none": what the family decodes is no picture in [-1, 1], or bytes already;
    it goes to the extractor as it is."""
    batch: Count = 256
    """Images per network call and rank; changes nothing but speed and memory."""
    draw_on: Literal["cpu", "device"] = "cpu"
    """Where noise is drawn: "cpu" is the same on every machine, "device" is NVIDIA's published stream on CUDA."""
    precision: Precision = "fp32"
    """Autocast of the network; fp32 is exact."""
    channels_last: bool = False
    """Memory layout of convolutional networks; changes speed and rounding only."""
    speed: Speed = field(default="exact", metadata=ADDED)
    """exact: bit for bit. compiled: fused blocks, other rounding. fast: compiled and bf16 (neon/runtime/speed.py)."""
    options: object = None
    """The family's own sampling options (a `Family.sampling`)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.speed == "fast" and self.precision != "fp32":
            raise ValueError(f"speed = 'fast' is bf16: leave precision away, got precision = {self.precision!r}")

    @property
    def arithmetic(self) -> Precision:
        """The precision that networks run in."""
        return "bf16" if self.speed == "fast" else self.precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Synth:
    """The synthetic set S."""

    num_images: Annotated[int, Range(least=1, most=NUM_SEEDS)]
    first_seed: Seed = 0
    """Image i has seed first_seed + i on any number of GPUs."""
    labels: Labels = "balanced"
    store: Literal["images", "codes"] = "images"
    """images: decoded uint8, encoded again for training (published). codes: what the sampler made, nothing
    recomputed."""
    shard_images: Count = 1024
    cfg_scale: float | None = None
    sampling: Sampling | None = None
    """[synth.sampling] holds the keys of [sampling] in which S differs, for example num_steps; None: S is drawn as
    [sampling] says."""

    def __post_init__(self) -> None:
        check_fields(self)
