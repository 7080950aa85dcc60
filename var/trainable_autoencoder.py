"""Training VAR's tokeniser: absolute error, codebook loss and commitment, with gradients passed straight through the
quantiser.

van den Oord et al. 2017 (arXiv 1711.00937), equation 3, averaged over the scales as in Tian et al. 2024 (arXiv
2404.02905), section 3.2, without its perceptual and adversarial terms.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from neon import config_table
from neon.family import Draws, TrainableAutoencoder
from neon.quantize import from_uint8
from neon.seeds import Rng
from var.options import AutoencoderObjective
from var.vqvae import VQVAE, VQVAEArch


class TrainableVQVAE(TrainableAutoencoder[VQVAE, AutoencoderObjective]):
    objective = AutoencoderObjective

    def build(self, arch: Mapping[str, object]) -> VQVAE:
        return VQVAE(config_table.build(VQVAEArch, arch, "autoencoder.arch"))

    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: AutoencoderObjective) -> Draws:
        """Nothing here is random."""
        return {}

    def loss(
        self, model: VQVAE, codes: Tensor, labels: Tensor | None, draws: Draws, how: AutoencoderObjective
    ) -> Tensor:
        """mean |x - decode(f_hat)| + mean over scales of (|f_hat_k - sg f|^2 + beta |f - sg f_hat_k|^2), f_hat_k up to
        scale k."""
        images = from_uint8(codes)
        f = model.encode(images)
        scales = [f_hat for _, f_hat in model.quantize.scales(f.detach())]
        straight = f + (scales[-1] - f).detach()
        errors = (images - model.decode_unclipped(straight)).abs().flatten(1).mean(1)
        codebook = torch.stack([(f_hat - f.detach()).square().flatten(1).mean(1) for f_hat in scales]).mean(0)
        commitment = torch.stack([(f - f_hat.detach()).square().flatten(1).mean(1) for f_hat in scales]).mean(0)
        return errors + codebook + how.commitment * commitment

    def reconstruct(self, model: VQVAE, images: Tensor) -> Tensor:
        return model.indices_to_image(model.image_to_indices(from_uint8(images)))
