"""The KL-16 autoencoder of xAR (from MAR, `kl16.ckpt`): images in [-1, 1] <-> latents of about unit variance.

Li et al. 2024 (arXiv 2406.11838); Ren et al. 2025 (arXiv 2502.20388). The state dict is that of the file's entry
`model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from neon.networks.autoencoder import ConvArch, KLAutoencoder, sample_posterior

LATENT_SCALE = 0.2325
"""1 / standard deviation of the published autoencoder's latents on ImageNet: the transformer sees sample *
LATENT_SCALE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KL16Arch:
    """Constructor arguments of a KL16; the defaults are the published network's. See ConvArch for the first group."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    image_channels: int = 3
    num_groups: int = 32
    resolution: int = 256
    """Only decides, with the next two, which levels have attention; images may have any side that can be halved."""
    encoder_attn_resolutions: tuple[int, ...] = (16,)
    decoder_attn_resolutions: tuple[int, ...] = ()
    latent_scale: float = LATENT_SCALE

    @property
    def conv(self) -> ConvArch:
        return ConvArch(
            ch=self.ch,
            ch_mult=self.ch_mult,
            num_res_blocks=self.num_res_blocks,
            z_channels=self.z_channels,
            image_channels=self.image_channels,
            num_groups=self.num_groups,
            has_moments=True,
            encoder_attention=self._levels(self.encoder_attn_resolutions),
            decoder_attention=self._levels(self.decoder_attn_resolutions),
        )

    def _levels(self, sides: Sequence[int]) -> tuple[int, ...]:
        return tuple(level for level in range(len(self.ch_mult)) if self.resolution >> level in sides)


class KL16(KLAutoencoder):
    """A KL autoencoder, and the units of the transformer: its latents are samples of the posterior times
    `latent_scale`."""

    def __init__(self, arch: KL16Arch):
        super().__init__(arch.conv)
        self.latent_scale = arch.latent_scale

    def to_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Moments (B, 2 Z, h, w) and unit normal noise (B, Z, h, w) -> the transformer's latents (B, Z, h, w)."""
        return sample_posterior(moments, noise) * self.latent_scale

    def from_latents(self, latents: Tensor) -> Tensor:
        """The transformer's latents (B, Z, h, w) -> images (B, C, f h, f w), about [-1, 1], not clipped."""
        return self.decode(latents / self.latent_scale)
