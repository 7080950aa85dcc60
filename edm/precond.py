"""Preconditioned denoisers D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (arXiv 2206.00364, table 1).

Class names, constructor arguments and state-dict keys are those of the published checkpoints.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm.unet import DhariwalUNet, SongUNet

Network = SongUNet | DhariwalUNet
NETWORKS: dict[str, Callable[..., Network]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class Coefficients(NamedTuple):
    """Each (B or 1, 1, 1, 1)."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


class Denoiser(nn.Module):
    """What a sampler asks of a model: forward(x, sigma, class_labels) -> expected clean image (B, C, R, R) float32."""

    img_resolution: int
    img_channels: int
    label_dim: int
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise level that the network knows, in sigma's dtype."""
        return sigma


class Preconditioner(Denoiser):
    """What the four formulations share: the network and the assembly of D.

    pixel_unshuffle: an addition of ours. The network sees images folded by this factor (28 x 28 grey -> 14 x 14 with 4
        channels for 2). Folding only permutes pixels, so samplers and losses do not depend on it.
    model_kwargs: the remaining constructor arguments of the network, as checkpoints store them beside ours.
    """

    default_model: str
    outputs_per_channel = 1

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool,
        model_type: str | None,
        pixel_unshuffle: int,
        model_kwargs: dict[str, object],
    ):
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.pixel_unshuffle = pixel_unshuffle
        model_type = model_type or self.default_model
        if model_type not in NETWORKS:
            raise ValueError(f"model_type must be one of {', '.join(NETWORKS)}, got {model_type!r}")
        if pixel_unshuffle < 1 or img_resolution % pixel_unshuffle:
            raise ValueError(f"pixel_unshuffle must divide img_resolution {img_resolution}, got {pixel_unshuffle}")
        network = NETWORKS[model_type]
        unknown = sorted(set(model_kwargs) - set(inspect.signature(network).parameters))
        if unknown:
            raise ValueError(f"{type(self).__name__}({model_type}): unknown constructor arguments {', '.join(unknown)}")
        channels = img_channels * pixel_unshuffle**2
        self.model = network(
            img_resolution=img_resolution // pixel_unshuffle,
            in_channels=channels,
            out_channels=channels * self.outputs_per_channel,
            label_dim=label_dim,
            **model_kwargs,
        )

        self.augment_dim = self.model.augment_dim

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """sigma: (B or 1, 1, 1, 1) float32."""
        raise TypeError(f"{type(self).__name__} defines no preconditioning; use one of {', '.join(PRECONDITIONERS)}")

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """The expected clean image, float32.

        x: (B, C, R, R), clean image plus sigma times unit noise, clean images in [-1, 1].
        sigma: () or (B,); one value for the batch is embedded once.
        class_labels: (B or 1, label_dim) one-hot; zero rows and None are the null class.
        augment_labels: (B, augment_dim); None stands for no augmentation.
        """
        x = x.float()
        c = self.coefficients(sigma.to(torch.float32).reshape(-1, 1, 1, 1).to(x.device))
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros(1, self.label_dim, device=x.device)
        else:
            class_labels = class_labels.float().reshape(-1, self.label_dim)
        half = self.use_fp16 and x.device.type == "cuda"  # the published networks run in fp16 on GPUs only
        f_in = F.pixel_unshuffle((c.input * x).to(torch.float16 if half else torch.float32), self.pixel_unshuffle)
        f_out = self.model(f_in, c.noise.flatten(), class_labels, augment_labels=augment_labels)
        f_out = F.pixel_shuffle(f_out, self.pixel_unshuffle)
        return c.skip * x + c.out * f_out[:, : self.img_channels].float()


class EDMPrecond(Preconditioner):
    """The formulation of EDM; all published CIFAR-10, FFHQ and ImageNet models."""

    default_model = "DhariwalUNet"

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
        model_type: str | None = None,
        pixel_unshuffle: int = 1,
        **model_kwargs: object,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, pixel_unshuffle, model_kwargs)
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def coefficients(self, sigma: Tensor) -> Coefficients:
        data = self.sigma_data
        total = sigma**2 + data**2
        return Coefficients(
            skip=data**2 / total, out=sigma * data / total.sqrt(), input=1 / total.sqrt(), noise=sigma.log() / 4
        )


class VPPrecond(Preconditioner):
    """Variance preserving (Song et al. 2021), with sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""

    default_model = "SongUNet"

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        model_type: str | None = None,
        pixel_unshuffle: int = 1,
        **model_kwargs: object,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, pixel_unshuffle, model_kwargs)
        self.beta_d, self.beta_min, self.M, self.epsilon_t = beta_d, beta_min, M, epsilon_t
        self.sigma_min = float(vp_sigma(torch.tensor(epsilon_t, device="cpu"), beta_d=beta_d, beta_min=beta_min))
        self.sigma_max = float(vp_sigma(torch.tensor(1.0, device="cpu"), beta_d=beta_d, beta_min=beta_min))

    def coefficients(self, sigma: Tensor) -> Coefficients:
        t = ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d
        return Coefficients(
            skip=torch.ones_like(sigma), out=-sigma, input=1 / (sigma**2 + 1).sqrt(), noise=(self.M - 1) * t
        )


def vp_sigma(t: Tensor, *, beta_d: float, beta_min: float) -> Tensor:
    """Noise level of the VP process at time t in [0, 1]."""
    # not expm1: the published sigma_min carries the rounding error of exp(...) - 1 in float32
    return ((0.5 * beta_d * t**2 + beta_min * t).exp() - 1).sqrt()


class VEPrecond(Preconditioner):
    """Variance exploding (Song et al. 2021)."""

    default_model = "SongUNet"

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
        model_type: str | None = None,
        pixel_unshuffle: int = 1,
        **model_kwargs: object,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, pixel_unshuffle, model_kwargs)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> Coefficients:
        one = torch.ones_like(sigma)
        return Coefficients(skip=one, out=sigma, input=one, noise=(0.5 * sigma).log())


class iDDPMPrecond(Preconditioner):  # noqa: N801 - the class name stored in checkpoints
    """Improved DDPM (Nichol and Dhariwal 2021): M discrete noise levels u[0] > ... > u[M] = 0."""

    default_model = "DhariwalUNet"
    outputs_per_channel = 2  # mean and variance; the variance is not used

    u: Tensor

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str | None = None,
        pixel_unshuffle: int = 1,
        **model_kwargs: object,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, pixel_unshuffle, model_kwargs)
        self.M = M
        # on the CPU even if the network is built on the meta device: sigma_min and sigma_max need the values
        u = torch.zeros(M + 1, device="cpu")
        alpha_bar = (0.5 * math.pi * torch.arange(M + 1, device="cpu") / M / (C_2 + 1)).sin() ** 2
        for j in range(M, 0, -1):
            u[j - 1] = ((u[j] ** 2 + 1) / (alpha_bar[j - 1] / alpha_bar[j]).clip(min=C_1) - 1).sqrt()
        self.register_buffer("u", u)
        self.sigma_min, self.sigma_max = float(u[M - 1]), float(u[0])

    def coefficients(self, sigma: Tensor) -> Coefficients:
        noise = self.M - 1 - self.nearest_level(sigma).to(torch.float32)
        return Coefficients(skip=torch.ones_like(sigma), out=-sigma, input=1 / (sigma**2 + 1).sqrt(), noise=noise)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.u[self.nearest_level(sigma)].to(sigma.dtype)

    def nearest_level(self, sigma: Tensor) -> Tensor:
        """Index into u of the closest level, the first of equals; int64 of sigma's shape."""
        distance = (sigma.to(torch.float32).reshape(-1, 1) - self.u[None, :]).abs()
        return distance.argmin(dim=1).reshape(sigma.shape)


def one_hot(labels: Tensor | None, label_dim: int) -> Tensor | None:
    """(B,) class indices -> (B, label_dim) float32; None for an unconditional network."""
    if label_dim == 0:
        return None
    if labels is None:
        raise ValueError(f"the network takes {label_dim} classes, but the images have no labels")
    if labels.device.type == "cpu" and (labels.min() < 0 or labels.max() >= label_dim):  # a GPU's kernel checks itself
        raise ValueError(
            f"class labels must be in 0 .. {label_dim - 1}, got {int(labels.min())} .. {int(labels.max())}"
        )
    return F.one_hot(labels, label_dim).float()


PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    preconditioner.__name__: preconditioner for preconditioner in (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)
}
