"""Between uint8 images and the space in which IMM's network works: latents of Stable Diffusion's autoencoder, or
pixels.

Zhou et al. 2025 (arXiv 2503.07565) train on latents of `stabilityai/sd-vae-ft-ema`, shifted and scaled per channel; the
usual factor 0.18215 is not used.
"""

# B batch, C image channels, R image side, Z latent channels, r latent side

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neon.networks.autoencoder import KLAutoencoder, mean_and_std
from neon.quantize import from_uint8


class StabilityEncoder(nn.Module):
    """uint8 images <-> latents of IMM, by an SD autoencoder and one shift and scale per latent channel.

    raw_mean, raw_std: statistics of the autoencoder's latents (the defaults are those of the published ImageNet-256
    model); they are brought to mean `final_mean` and standard deviation `final_std`.
    """

    scale: Tensor
    bias: Tensor

    def __init__(
        self,
        vae: KLAutoencoder,
        *,
        raw_mean: Sequence[float] = (0.86488, -0.27787343, 0.21616915, 0.3738409),
        raw_std: Sequence[float] = (4.85503674, 5.31922414, 3.93725398, 3.9870003),
        final_mean: float = 0.0,
        final_std: float = 0.5,
    ):
        super().__init__()
        if not len(raw_mean) == len(raw_std) == vae.arch.z_channels:
            raise ValueError(
                f"raw_mean and raw_std need one entry per latent channel ({vae.arch.z_channels}), got {raw_mean}, "
                f"{raw_std}"
            )
        self.vae = vae
        scale = torch.tensor(final_std) / torch.tensor(raw_std)
        bias = torch.tensor(final_mean) - torch.tensor(raw_mean) * scale
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("bias", bias[:, None, None], persistent=False)

    def encode_pixels(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, R, R) -> mean and standard deviation of the posterior, (B, 2 Z, r, r) float32.

        This is what IMM's latent datasets hold (not the log variance).
        """
        moments = self.vae.encode(from_uint8(images))
        return torch.cat(mean_and_std(moments), dim=1).float()

    def to_latents(self, mean_std: Tensor, noise: Tensor) -> Tensor:
        """Mean and standard deviation (B, 2 Z, r, r) and unit normal noise (B, Z, r, r) -> latents (B, Z, r, r)."""
        mean, std = mean_std.chunk(2, dim=1)
        return (mean + noise * std) * self.scale + self.bias

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, Z, r, r) -> images (B, C, R, R), about [-1, 1], not clipped, float32. Published rounding:
        "truncate"."""
        return self.vae.decode((latents - self.bias) / self.scale).float()


class PixelEncoder(nn.Module):
    """uint8 images <-> the pixel models' space, which is images in [-1, 1]. Published rounding: "edm"."""

    def to_latents(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, R, R) -> [-1, 1] float32."""
        return from_uint8(images)

    def decode(self, latents: Tensor) -> Tensor:
        """The network's images are images already."""
        return latents
