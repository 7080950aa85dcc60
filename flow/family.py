"""Flow matching on pixels as TorchCFM does it (Tong et al. 2024, arXiv 2302.00482), as a Neon family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flow import load
from flow.loss import pairs, path
from flow.options import Objective, Sampling
from flow.sampler import dopri5, euler
from flow.unet import UNet
from neon.checkpoints.checkpoint import Checkpoint
from neon.family import Draws, Family
from neon.seeds import Rng


class Flow(Family[UNet, Objective, Sampling]):
    """Codes are images (B, C, H, W) in [-1, 1] as the sampler makes them, not clipped; training eats these or uint8
    images."""

    name = "flow"
    sampling = Sampling
    objective = Objective

    def graphed(self, model: UNet) -> UNet:
        return model

    def build(self, arch: Mapping[str, object]) -> UNet:
        return load.unet(arch)

    def arch_of(self, checkpoint: Checkpoint) -> Mapping[str, object]:
        return load.arch_from_shapes(checkpoint) if checkpoint.arch is None else checkpoint.arch

    def load(self, checkpoint: Checkpoint) -> UNet:
        return checkpoint.filled(self.build, self.arch_of(checkpoint))

    def num_classes(self, model: UNet) -> int:
        return model.num_classes

    def img_size(self, model: UNet) -> int:
        return model.dim[2]

    @torch.no_grad()
    def sample(self, model: UNet, rng: Rng, labels: Tensor | None, how: Sampling) -> tuple[Tensor, Tensor | None]:
        """Every image draws its noise, then its class if the network has classes and none are given."""
        noise = rng.normal(model.dim)
        if model.num_classes == 0:
            labels = None
        elif labels is None:
            labels = rng.integers(model.num_classes)
        if how.num_steps is None:  # dopri5, which chooses its steps
            return dopri5(model, noise, labels, (0.0, 1.0), tol=how.tol, error_norm=how.error_norm)[-1], labels
        times = torch.linspace(0, 1, how.num_steps + 1, device=noise.device)
        return euler(model, noise, labels, times)[-1], labels

    def draws_see_codes(self, how: Objective) -> bool:
        """Optimal transport pairs the noise with the images of the whole batch."""
        return how.is_paired

    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: Objective) -> Draws:
        """In this order: `flipped` (B,) of stored images, `noise` like codes, the pairing, `t` (B,), `path_noise` like
        codes if sigma > 0.

        The pairing needs the whole batch, of which `loss` sees a part: the noise is put into the order of its images.
        Pairs that are drawn leave images out and repeat others, so the draws then hold `images` and `labels` too.
        """
        draws: Draws = {}
        if how.flip and codes.dtype == torch.uint8:
            draws["flipped"] = rng.uniform(()) < how.flip
        draws["noise"] = rng.normal(codes.shape[1:])
        if how.is_paired:
            draws = self._paired(rng, codes, labels, draws, how)
        draws["t"] = rng.uniform(())
        if how.has_path_noise:
            draws["path_noise"] = rng.normal(codes.shape[1:])
        return draws

    def _paired(self, rng: Rng, codes: Tensor, labels: Tensor | None, draws: Draws, how: Objective) -> Draws:
        images = to_pixels(codes, draws.get("flipped"))
        uniform = None if how.pairing == "assigned" else rng.uniform((), torch.float64)
        i, j = pairs(how, draws["noise"], images, uniform)
        if uniform is None:
            return {**draws, "noise": draws["noise"][i]}
        paired = {"noise": draws["noise"][i], "images": images[j]}
        return paired if labels is None else {**paired, "labels": labels[j]}

    def loss(self, model: UNet, codes: Tensor, labels: Tensor | None, draws: Draws, how: Objective) -> Tensor:
        """The mean squared error of every image's velocity."""
        images = draws["images"] if "images" in draws else to_pixels(codes, draws.get("flipped"))
        labels = draws.get("labels", labels) if model.num_classes else None
        x_t, u_t = path(how, draws["noise"], images, draws["t"], draws.get("path_noise"))
        return (model(draws["t"], x_t, labels) - u_t).square().mean((1, 2, 3))


def to_pixels(codes: Tensor, flipped: Tensor | None) -> Tensor:
    """Float images (B, C, H, W): bytes as TorchCFM normalises them (rounded differently from `quantize.from_uint8`),
    mirrored where `flipped` (B,) says so; floats as they are."""
    images = (codes.float() / 255 - 0.5) / 0.5 if codes.dtype == torch.uint8 else codes
    return images if flipped is None else torch.where(flipped[:, None, None, None], images.flip(-1), images)


FAMILY = Flow
