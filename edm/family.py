"""EDM (Karras et al. 2022, arXiv 2206.00364) as a family of generators. Codes are pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm import augment
from edm.layers import UNetBlock
from edm.loss import Objective, pixel_losses
from edm.precond import PRECONDITIONERS, Denoiser, Preconditioner
from edm.sampler import Churn, noise_levels, sample_heun
from neon.binding import construct
from neon.checkpoints.checkpoint import Checkpoint
from neon.family import Draws, Family
from neon.quantize import from_uint8
from neon.seeds import Rng

STATES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of Heun's method; the defaults are EDM's for 32 x 32 images."""

    num_steps: int = 18
    """Solver steps; network calls = 2 num_steps - 1."""
    sigma_min: float = 0.002
    """Smallest noise level, raised to the network's own."""
    sigma_max: float = 80.0
    """Largest noise level, lowered to the network's own."""
    rho: float = 7.0
    """Larger values put more steps at small noise levels."""
    S_churn: float = 0.0
    """Total noise added and removed again along the way; 0 is deterministic."""
    S_min: float = 0.0
    """Churn only noise levels above."""
    S_max: float = math.inf
    """Churn only noise levels below."""
    S_noise: float = 1.0
    """Standard deviation of the churned noise."""
    state: Literal["float64", "float32"] = "float64"
    """dtype of the image between network calls and of the churned noise. float32 is the published script for guided
    sampling, which also draws no noise in steps that S_min and S_max exclude."""

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise ValueError(f"sampling.num_steps must be >= 2, got {self.num_steps}")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sampling needs 0 < sigma_min < sigma_max < inf, got {self.sigma_min} and {self.sigma_max}"
            )
        if not self.rho > 0:
            raise ValueError(f"sampling.rho must be > 0, got {self.rho}")
        if self.state not in STATES:
            raise ValueError(f"sampling.state must be float64 or float32, got {self.state!r}")
        if not self.S_churn >= 0:
            raise ValueError(f"sampling.S_churn must be >= 0, got {self.S_churn}")


class EDM(Family[Denoiser, Objective, Sampling]):
    """Pixel-space diffusion with a preconditioned U-Net."""

    name = "edm"
    sampling = Sampling
    objective = Objective
    compiled = (UNetBlock,)

    def graphed(self, model: nn.Module) -> nn.Module | None:
        return model.model if isinstance(model, Preconditioner) else None

    def load(self, checkpoint: Checkpoint) -> Denoiser:
        return checkpoint.filled(lambda: self.build(self.arch_of(checkpoint)))

    def build(self, arch: Mapping[str, object]) -> Preconditioner:
        """arch: `class_name` (EDMPrecond, VPPrecond, VEPrecond or iDDPMPrecond) and that class's constructor
        arguments."""
        arguments = dict(arch)
        class_name = arguments.pop("class_name", None)
        if class_name not in PRECONDITIONERS:
            raise ValueError(f"arch.class_name must be one of {', '.join(PRECONDITIONERS)}, got {class_name!r}")
        return construct(PRECONDITIONERS[str(class_name)], arguments, "arch")

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
        dtype = STATES[how.state]
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
            "without "
            "augmentation labels it would learn to generate augmented images. Set augment = 0"
        )
    return augment.augment(pipe, images, draws)


def one_hot(labels: Tensor | None, label_dim: int) -> Tensor | None:
    """(B,) class indices -> (B, label_dim) float32; None for an unconditional network."""
    if label_dim == 0:
        return None
    if labels is None:
        raise ValueError(f"the network takes {label_dim} classes, but the images have no labels")
    if labels.min() < 0 or labels.max() >= label_dim:
        raise ValueError(
            f"class labels must be in 0 .. {label_dim - 1}, got {int(labels.min())} .. {int(labels.max())}"
        )
    return F.one_hot(labels, label_dim).float()


def _trainable(model: Denoiser) -> Preconditioner:
    if not isinstance(model, Preconditioner):
        raise ValueError(f"family edm trains one of {', '.join(PRECONDITIONERS)}, got {type(model).__name__}")
    return model


FAMILY = EDM
