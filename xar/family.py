"""xAR as a Neon family: codes are the KL-16 autoencoder's latents, sampled cell by cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from neon import config_table
from neon.checkpoints.checkpoint import Checkpoint
from neon.family import Draws, Family
from neon.quantize import from_uint8
from neon.seeds import Rng
from xar.cells import CELL_TOKENS, CHANNELS, GRID, NUM_CELLS
from xar.load import arch_from_shapes, check_tables, read_autoencoder
from xar.loss import velocity_loss
from xar.options import Objective, Sampling
from xar.sampler import sample_cells
from xar.trainable_autoencoder import TrainableKL16
from xar.transformer import Block, XARArch, XARTransformer
from xar.vae import KL16


class XAR(Family[XARTransformer, Objective, Sampling]):
    """Codes: moments of an image and of its mirror image (B, 2, 32, 16, 16), or sampled latents (B, 16, 16, 16)."""

    name = "xar"
    sampling = Sampling
    objective = Objective
    trainable_autoencoder = TrainableKL16()

    def __init__(self) -> None:
        self._autoencoder: KL16 | None = None

    compiled = (Block,)
    replayed = ("exact",)  # compiled blocks in graphs were not measured

    def graphed(self, model: XARTransformer) -> XARTransformer:
        return model

    def build(self, arch: Mapping[str, object]) -> XARTransformer:
        return XARTransformer(config_table.build(XARArch, arch, "arch"))

    def arch_of(self, checkpoint: Checkpoint) -> dict[str, object]:
        return asdict(arch_from_shapes(checkpoint.specs)) if checkpoint.arch is None else checkpoint.arch

    def load(self, checkpoint: Checkpoint) -> XARTransformer:
        """Also checks the stored mask and rotary tables."""
        model = checkpoint.filled(self.build, self.arch_of(checkpoint))
        check_tables(model, checkpoint.path)
        return model

    def open(self, autoencoder: Path | None, device: torch.device) -> None:
        if autoencoder is None:
            raise ValueError("xAR works on latents: name its autoencoder, base.autoencoder (published: kl16.ckpt)")
        self.use(read_autoencoder(autoencoder).to(device))

    def use(self, autoencoder: KL16) -> None:
        """Work with an autoencoder that is in memory already."""
        self._autoencoder = autoencoder.eval().requires_grad_(False)

    @property
    def autoencoder(self) -> KL16:
        if self._autoencoder is None:
            raise ValueError("xAR needs its autoencoder here: name it as base.autoencoder (published: kl16.ckpt)")
        return self._autoencoder

    def sample(self, model: XARTransformer, rng: Rng, labels: Tensor | None, how: Sampling) -> tuple[Tensor, Tensor]:
        labels = rng.integers(model.num_classes) if labels is None else labels
        latents = sample_cells(model, rng, labels, num_steps=how.num_steps, cfg_scale=how.cfg_scale, solver=how.solver)
        return latents, labels

    def autoencoder_modules(self) -> list[nn.Module]:
        return [] if self._autoencoder is None else [self._autoencoder]

    def decode(self, codes: Tensor) -> Tensor:
        return self.autoencoder.from_latents(codes)

    def encode(self, images: Tensor) -> Tensor:
        pixels = from_uint8(images)
        both = torch.stack([pixels, pixels.flip(-1)], dim=1)
        return self.autoencoder.encode(both.flatten(0, 1)).unflatten(0, both.shape[:2])

    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: Objective) -> Draws:
        draws: Draws = {}
        if is_moments(codes):
            draws["flipped"] = rng.uniform(()) < how.flip
            draws["posterior_noise"] = rng.normal((CHANNELS, GRID, GRID))
        draws["label_dropped"] = rng.uniform(()) < how.label_drop
        draws["times"] = rng.normal((NUM_CELLS,), torch.float64).sigmoid().float()  # logit-normal, one per cell
        draws["noise"] = rng.normals(NUM_CELLS, (CELL_TOKENS, CHANNELS)).transpose(0, 1)
        return draws

    def loss(self, model: XARTransformer, codes: Tensor, labels: Tensor | None, draws: Draws, how: Objective) -> Tensor:
        if labels is None:
            raise ValueError("xAR is trained with class labels; this set of images has none")
        labels = torch.where(draws["label_dropped"], model.num_classes, labels)
        latents = self._latents(codes, draws)
        dropout = how.dropout if model.training else 0.0
        return velocity_loss(model, latents, labels, times=draws["times"], noise=draws["noise"], dropout=dropout)

    def _latents(self, codes: Tensor, draws: Draws) -> Tensor:
        if not is_moments(codes):
            return codes
        moments = torch.where(draws["flipped"][:, None, None, None], codes[:, 1], codes[:, 0])
        return self.autoencoder.to_latents(moments, draws["posterior_noise"])

    def img_size(self, model: XARTransformer) -> int:
        return GRID * self.autoencoder.arch.downsampling

    def num_classes(self, model: XARTransformer) -> int:
        return model.num_classes

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Everything but vectors and biases: the class and position embeddings decay too, as published."""
        return parameter.ndim > 1 and not name.endswith(".bias")


def is_moments(codes: Tensor) -> bool:
    """Whether codes come from `encode` (stored images) rather than from `sample`."""
    return codes.ndim == 5


FAMILY = XAR
