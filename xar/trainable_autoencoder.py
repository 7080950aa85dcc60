"""Training a KL autoencoder for xAR: absolute error plus a very small pull of the posterior towards N(0, 1).

Rombach et al. 2022 (arXiv 2112.10752), section 3.1, without its perceptual and adversarial terms. The transformer
expects latents of unit variance, so `calibrated` measures the trained autoencoder's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from neon import config_table
from neon.family import Draws, TrainableAutoencoder
from neon.networks.autoencoder import kl_to_unit_normal, mean_and_std, sample_posterior
from neon.quantize import from_uint8
from neon.seeds import ImageRng, Rng
from xar.options import AutoencoderObjective
from xar.vae import KL16, KL16Arch


class TrainableKL16(TrainableAutoencoder[KL16, AutoencoderObjective]):
    objective = AutoencoderObjective

    def build(self, arch: Mapping[str, object]) -> KL16:
        return KL16(config_table.build(KL16Arch, arch, "autoencoder.arch"))

    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: AutoencoderObjective) -> Draws:
        """A seed per image: `loss` draws the noise from it, because only the network knows its shape."""
        return {"noise_seed": rng.integers(1 << 32)}

    def loss(
        self, model: KL16, codes: Tensor, labels: Tensor | None, draws: Draws, how: AutoencoderObjective
    ) -> Tensor:
        """(|x - decode(z)|_1 + kl_weight KL) / number of pixel values, z one sample of the posterior."""
        images = from_uint8(codes)
        moments = model.encode(images)
        mean, _ = mean_and_std(moments)
        noise = ImageRng(draws["noise_seed"].tolist(), images.device).normal(mean.shape[1:])
        errors = (images - model.decode(sample_posterior(moments, noise))).abs().flatten(1)
        return errors.mean(1) + how.kl_weight * kl_to_unit_normal(moments) / errors.shape[1]

    def reconstruct(self, model: KL16, images: Tensor) -> Tensor:
        """Through the mean of the posterior."""
        mean, _ = mean_and_std(model.encode(from_uint8(images)))
        return model.decode(mean)

    def calibrated(self, model: KL16, images: Tensor, arch: Mapping[str, object]) -> dict[str, object]:
        """latent_scale = 1 / standard deviation of the posterior's samples over all images, channels and positions."""
        mean, std = mean_and_std(model.encode(from_uint8(images)))
        return {**arch, "latent_scale": float((mean.double().var() + std.double().square().mean()).rsqrt())}
