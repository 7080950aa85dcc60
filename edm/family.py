"""EDM (Karras et al. 2022, arXiv 2206.00364) as a Neon family: codes are pixels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edm import augment, load
from edm.loss import pixel_losses
from edm.options import Objective, Sampling
from edm.precond import PRECONDITIONERS, Denoiser, Preconditioner, one_hot
from edm.sampler import Churn, noise_levels, sample_heun
from neon.checkpoints.checkpoint import Checkpoint
from neon.family import Draws, Family
from neon.quantize import from_uint8
from neon.seeds import Rng

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class EDM(Family[Denoiser, Objective, Sampling]):
    """Pixel-space diffusion with a preconditioned U-Net."""

    name = "edm"
    sampling = Sampling
    objective = Objective

    def graphed(self, model: Denoiser) -> nn.Module | None:
        return model.model if isinstance(model, Preconditioner) else None

    def build(self, arch: Mapping[str, object]) -> Preconditioner:
        return load.denoiser(arch)

    def load(self, checkpoint: Checkpoint) -> Denoiser:
        return checkpoint.filled(self.build, self.arch_of(checkpoint))

    def num_classes(self, model: Denoiser) -> int:
        return model.label_dim

    def img_size(self, model: Denoiser) -> int:
        return model.img_resolution

    def sample(self, model: Denoiser, rng: Rng, labels: Tensor | None, how: Sampling) -> tuple[Tensor, Tensor | None]:
        """Pixels (B, C, R, R) in how.state, not clipped.

        Every image draws in the published order: latents (float32), a class index (if the network is conditional; given
        labels replace it, so that they do not shift what follows), one noise per step (if S_churn > 0).
        """
        shape = (model.img_channels, model.img_resolution, model.img_resolution)
        latents = rng.normal(shape)
        if model.label_dim:
            drawn = rng.integers(model.label_dim)
            labels = drawn if labels is None else labels.to(latents.device)
        else:
            labels = None
        class_labels = one_hot(labels, model.label_dim)
        sigma_min, sigma_max = max(how.sigma_min, model.sigma_min), min(how.sigma_max, model.sigma_max)
        dtype = DTYPES[how.state]
        sigmas = noise_levels(how.num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=how.rho, dtype=dtype)
        churn = Churn(S_churn=how.S_churn, S_min=how.S_min, S_max=how.S_max, S_noise=how.S_noise)

        def noise(level: float) -> Tensor:
            is_unused = churn.gamma(level, how.num_steps) == 0
            return latents.new_zeros(()) if is_unused and how.state == "float32" else rng.normal(shape, dtype)

        codes = sample_heun(
            lambda x, sigma: model(x, sigma, class_labels),
            latents,
            model.round_sigma(sigmas.to(latents.device)),
            churn=churn,
            noise=noise,
            round_sigma=model.round_sigma,
        )
        return codes, labels

    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: Objective) -> Draws:
        """In this order: level (B, 1, 1, 1), augmentation (edm/augment.py), noise like codes, label_drop (B, 1)."""
        draws = {"level": rng.normal((1, 1, 1)) if how.kind == "edm" else rng.uniform((1, 1, 1))}
        if how.augment > 0:
            draws |= augment.draw(augment.training_pipe(how.augment), rng)
        draws["noise"] = rng.normal(codes.shape[1:])
        if labels is not None:
            draws["label_drop"] = rng.uniform((1,))
        return draws

    def loss(self, model: Denoiser, codes: Tensor, labels: Tensor | None, draws: Draws, how: Objective) -> Tensor:
        """The weighted squared error of every image, summed over its pixels."""
        return self.pixel_losses(model, codes, labels, draws, how).sum(dim=(1, 2, 3))

    def pixel_losses(
        self, model: Denoiser, codes: Tensor, labels: Tensor | None, draws: Draws, how: Objective
    ) -> Tensor:
        """The weighted squared error of every pixel, (B, C, R, R)."""
        net = _trainable(model)
        images = from_uint8(codes) if codes.dtype == torch.uint8 else codes.float()
        images, augment_labels = _augmented(net, images, draws, how)
        class_labels = one_hot(labels, net.label_dim)
        label_drop = net.model.label_dropout if how.label_drop is None else how.label_drop
        if class_labels is not None and label_drop:
            class_labels = class_labels * (draws["label_drop"] >= label_drop)
        return pixel_losses(
            how, net, images, class_labels, level=draws["level"], noise=draws["noise"], augment_labels=augment_labels
        )


def _augmented(net: Preconditioner, images: Tensor, draws: Draws, how: Objective) -> tuple[Tensor, Tensor | None]:
    if how.augment == 0:
        return images, None
    pipe = augment.training_pipe(how.augment)
    if net.augment_dim != pipe.label_dim:
        raise ValueError(
            f"objective.augment needs a network with augment_dim {pipe.label_dim}, this one has {net.augment_dim}: "
            "without augmentation labels it would learn to generate augmented images. Set augment = 0"
        )
    return augment.augment(pipe, images, draws)


def _trainable(model: Denoiser) -> Preconditioner:
    if not isinstance(model, Preconditioner):
        raise ValueError(f"family edm trains one of {', '.join(PRECONDITIONERS)}, got {type(model).__name__}")
    return model


FAMILY = EDM
