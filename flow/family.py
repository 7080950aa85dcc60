"""Flow matching on pixels as TorchCFM does it (Tong et al. 2024, arXiv 2302.00482), as a family of generators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flow.loss import Objective, path
from flow.presets import MODELS
from flow.sampler import ErrorNorm, dopri5, euler
from flow.unet import UNet
from neon.binding import construct
from neon.checkpoints.checkpoint import Checkpoint
from neon.family import Draws, Family
from neon.seeds import Rng


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the flow is integrated."""

    solver: Literal["dopri5", "euler"] = "dopri5"
    """dopri5: adaptive, as the published FIDs were measured; euler: num_steps equal steps."""
    num_steps: int | None = None
    """Network calls of Euler's method."""
    tol: float = 1e-5
    """Relative and absolute tolerance of dopri5. Below the network's own rounding (1e-2 in bf16, 1e-3 in TF32) it only
    costs steps."""
    error_norm: ErrorNorm = "image"
    """dopri5's error is measured per image, or over the whole batch, as published: images then depend on their batch
    and on the number of GPUs."""

    def __post_init__(self) -> None:
        if self.solver not in ("dopri5", "euler"):
            raise ValueError(f"solver must be dopri5 or euler, got {self.solver!r}")
        if self.error_norm not in ("image", "batch"):
            raise ValueError(f"error_norm must be image or batch, got {self.error_norm!r}")
        if self.solver == "euler" and (self.num_steps is None or self.num_steps < 1):
            raise ValueError(f"solver = 'euler' needs num_steps >= 1, got {self.num_steps}")
        if self.solver == "dopri5" and self.num_steps is not None:
            raise ValueError(
                f"num_steps ({self.num_steps}) belongs to solver = 'euler': dopri5 chooses its steps by tol"
            )
        if not self.tol > 0:
            raise ValueError(f"tol must be > 0, got {self.tol}")


class Flow(Family[UNet, Objective, Sampling]):
    """Codes are images (B, C, H, W) in [-1, 1] as the sampler makes them, not clipped; training eats these or uint8
    images."""

    name = "flow"
    sampling = Sampling
    objective = Objective

    def graphed(self, model: nn.Module) -> nn.Module | None:
        return model

    def build(self, arch: Mapping[str, object]) -> UNet:
        if arch.get("learn_sigma"):
            raise ValueError("arch.learn_sigma: a velocity has as many channels as the image")
        return construct(UNet, arch, "arch")

    def arch_of(self, checkpoint: Checkpoint) -> Mapping[str, object]:
        """TorchCFM's files hold tensors only. Heads, dropout and image size are not in their shapes, so only networks
        are recognised that TorchCFM's scripts make: published ones, at any num_channels, with any number of classes."""
        if checkpoint.arch is not None:
            return checkpoint.arch
        shapes = {name: tuple(value.shape) for name, value in checkpoint.specs.items()}
        _, *num_channels = shapes.get("time_embed.0.weight", (0,))
        classes, *_ = shapes.get("label_emb.weight", (0,))
        for model in MODELS.values() if num_channels else ():
            arch = {**model, "num_channels": num_channels[0]} | ({"num_classes": classes} if classes else {})
            if self._shapes(arch) == shapes:
                return arch
        raise ValueError(
            f"{checkpoint.path} does not say how its network is built, and its tensors are not those of a network "
            "that TorchCFM's scripts "
            f"make ({', '.join(MODELS)}). Write it with neon.checkpoints.checkpoint.write, whose metadata hold the "
            "constructor arguments as `arch`"
        )

    def _shapes(self, arch: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            return {name: tuple(value.shape) for name, value in self.build(arch).state_dict().items()}

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

        Pairing needs the whole batch, which `loss` does not see: noise comes in the order of its image. Pairs that are
        drawn leave images out and repeat others, so these draws hold the paired `images` and `labels` too.
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
        i, j = how.pairs(draws["noise"], images, uniform)
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
    """Float images (B, C, H, W): bytes as TorchCFM normalises them, mirrored where `flipped` (B,) says so; floats as
    they are."""
    images = (codes.float() / 255 - 0.5) / 0.5 if codes.dtype == torch.uint8 else codes
    return images if flipped is None else torch.where(flipped[:, None, None, None], images.flip(-1), images)


FAMILY = Flow
