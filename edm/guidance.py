"""Sampling-time guidance of one model by another: Neon's extrapolation applied to outputs instead of weights."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from edm.family import EDM
from edm.precond import Denoiser
from neon.checkpoints import checkpoint


class NegativeGuidance(Denoiser):
    """D = (1 + g) D_net - g D_guide, at the price of two networks (arXiv 2406.02507).

    With the self-trained model as the guide this is, to first order in the weights, Neon's merge with w = g; the
    scripts of arXiv 2510.03597 compare the two. g = 0 is the net and g = -1 the guide, one network each.
    """

    def __init__(self, net: Denoiser, guide: Denoiser, guidance: float):
        super().__init__()
        for name in ("img_resolution", "img_channels", "label_dim"):
            if getattr(net, name) != getattr(guide, name):
                raise ValueError(f"net and guide differ in {name}: {getattr(net, name)} and {getattr(guide, name)}")
        self.net, self.guide, self.guidance = net, guide, guidance
        self.img_resolution, self.img_channels, self.label_dim = net.img_resolution, net.img_channels, net.label_dim
        self.sigma_min, self.sigma_max = net.sigma_min, net.sigma_max

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.net.round_sigma(sigma)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        if self.guidance == 0:
            return self.net(x, sigma, class_labels)
        denoised_guide = self.guide(x, sigma, class_labels)
        if self.guidance == -1:
            return denoised_guide
        return (1 + self.guidance) * self.net(x, sigma, class_labels) - self.guidance * denoised_guide


class GuidedEDM(EDM):
    """EDM whose loaded models are guided by the model in the file `guide`."""

    def __init__(self, guide: Path, guidance: float, *, weights: str = "ema"):
        self.guide, self.guidance, self.weights = guide, guidance, weights

    def load(self, checkpoint_: checkpoint.Checkpoint) -> Denoiser:
        return NegativeGuidance(
            super().load(checkpoint_), super().load(checkpoint.read(self.guide, weights=self.weights)), self.guidance
        )
