"""IMM as a Neon family: inductive moment matching on SD latents (ImageNet-256) or on pixels (CIFAR-10)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from edm.precond import one_hot
from imm import load
from imm.dit import DiTBlock
from imm.encoders import PixelEncoder, StabilityEncoder
from imm.loss import imm_loss
from imm.options import Objective, Sampling
from imm.precond import IMMPrecond
from imm.sampler import pushforward, restart, time_grid
from neon.checkpoints.checkpoint import Checkpoint
from neon.family import Draws, Family
from neon.seeds import Rng


class IMM(Family[IMMPrecond, Objective, Sampling]):
    """Codes are images in [-1, 1] (B, 3, R, R), or latents (B, 4, R, R) of standard deviation 0.5 once an autoencoder
    is open.

    Training eats uint8 images, the autoencoder's mean and standard deviation (B, 8, R, R), or codes as the sampler made
    them.
    """

    name = "imm"
    sampling = Sampling
    objective = Objective
    compiled = (DiTBlock,)

    def __init__(self) -> None:
        self.encoder: StabilityEncoder | PixelEncoder = PixelEncoder()

    def graphed(self, model: IMMPrecond) -> nn.Module:
        return model.model

    def build(self, arch: Mapping[str, object]) -> IMMPrecond:
        return load.precond(arch)

    def load(self, checkpoint: Checkpoint) -> IMMPrecond:
        return checkpoint.filled(self.build, self.arch_of(checkpoint))

    def open(self, autoencoder: Path | None, device: torch.device) -> None:
        self.encoder = PixelEncoder() if autoencoder is None else load.read_autoencoder(autoencoder).to(device)

    def img_size(self, model: IMMPrecond) -> int:
        side = model.img_resolution
        return side if isinstance(self.encoder, PixelEncoder) else side * self.encoder.vae.arch.downsampling

    def num_classes(self, model: IMMPrecond) -> int:
        return model.label_dim

    def group(self, how: Objective) -> int:
        return how.group_size

    @torch.no_grad()
    def sample(self, model: IMMPrecond, rng: Rng, labels: Tensor | None, how: Sampling) -> tuple[Tensor, Tensor | None]:
        shape = (model.img_channels, model.img_resolution, model.img_resolution)
        noise = rng.normal(shape) * model.sigma_data
        if labels is None and model.label_dim:
            labels = rng.integers(model.label_dim)
        grid, class_labels = time_grid(model, how), one_hot(labels, model.label_dim)
        if how.sampler == "pushforward":
            codes = pushforward(model, noise, grid, class_labels, cfg_scale=how.cfg_scale)
        else:
            codes = restart(model, noise, grid, class_labels, rng, cfg_scale=how.cfg_scale)
        return codes.float(), labels if model.label_dim else None

    def autoencoder_modules(self) -> list[nn.Module]:
        return [] if isinstance(self.encoder, PixelEncoder) else [self.encoder.vae]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        if isinstance(self.encoder, PixelEncoder) and codes.shape[1] not in (1, 3):
            raise ValueError(
                f"these codes have {codes.shape[1]} channels: latents, which need an autoencoder. Name the SD VAE of "
                "the model (base.autoencoder, or --vae), for example stabilityai/sd-vae-ft-ema"
            )
        return self.encoder.decode(codes)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return images if isinstance(self.encoder, PixelEncoder) else self.encoder.encode_pixels(images)

    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: Objective) -> Draws:
        """In this order: `u_t` and `u_s` (one per group, repeated), `u_drop`, `noise`, and `latent` where codes are
        moments."""
        if rng.batch % how.group_size:
            raise ValueError(f"the batch ({rng.batch}) must be a multiple of objective.group_size ({how.group_size})")
        shape = self._latent_shape(codes)
        draws = {name: _per_group(rng.uniform((), torch.float64), how.group_size) for name in ("u_t", "u_s")}
        draws |= {"u_drop": rng.uniform(()), "noise": rng.normal(shape)}
        return draws | {"latent": rng.normal(shape)} if self._are_moments(codes) else draws

    def loss(self, model: IMMPrecond, codes: Tensor, labels: Tensor | None, draws: Draws, how: Objective) -> Tensor:
        step = {name: draws[name] for name in ("u_t", "u_s", "u_drop", "noise")}
        return imm_loss(model, self._clean(codes, draws), one_hot(labels, model.label_dim), **step, how=how)

    def _clean(self, codes: Tensor, draws: Draws) -> Tensor:
        if isinstance(self.encoder, StabilityEncoder) and self._are_moments(codes):
            return self.encoder.to_latents(codes, draws["latent"])
        if isinstance(self.encoder, PixelEncoder) and codes.dtype == torch.uint8:
            return self.encoder.to_latents(codes)
        return codes

    def _are_moments(self, codes: Tensor) -> bool:
        return isinstance(self.encoder, StabilityEncoder) and codes.shape[1] == 2 * self.encoder.vae.arch.z_channels

    def _latent_shape(self, codes: Tensor) -> tuple[int, ...]:
        channels = codes.shape[1] // 2 if self._are_moments(codes) else codes.shape[1]
        return (channels, *codes.shape[2:])


def _per_group(values: Tensor, group_size: int) -> Tensor:
    return values[::group_size].repeat_interleave(group_size)


FAMILY = IMM
