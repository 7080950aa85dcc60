"""xAR as a Neon family: codes are the KL-16 autoencoder's latents, sampled cell by cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from neon import binding
from neon.checkpoints.checkpoint import Checkpoint, read
from neon.checkpoints.safetensors_format import metas
from neon.family import Draws, Family
from neon.quantize import from_uint8
from neon.seeds import Rng
from xar.cells import CELL_TOKENS, CHANNELS, GRID, NUM_CELLS
from xar.loss import velocity_loss
from xar.sampler import Solver, sample_cells, time_grid
from xar.transformer import Block, XARArch, XARTransformer, read_arch
from xar.vae import KL16, KL16Arch
from xar.vae_training import TrainableKL16

BUFFER_TOLERANCE = 1e-5
"""Tables of a checkpoint were made by another version of torch: they may differ from ours in the last bits only."""


@dataclass(frozen=True, kw_only=True)
class XARSampling:
    """How latents are drawn."""

    num_steps: int
    """Steps per cell; 4 num_steps + 3 network calls per image. Published: 40 (xar_base), 50 (xar_large)."""
    cfg_scale: float = 1.0
    """Guidance of the last cell, rising linearly from 1 at the first; 1 or less means none."""
    solver: Solver = "sde"
    """sde: the published Euler-Maruyama; ode: Euler on the probability flow, no noise after the start."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {self.num_steps}")
        time_grid(self.num_steps, self.solver)


@dataclass(frozen=True, kw_only=True)
class XARObjective:
    """The loss's options; the defaults are the published recipe."""

    dropout: float = 0.1
    """Of attention weights, of the attention's output and inside the MLP."""
    label_drop: float = 0.1
    """Share of images trained with the null label, which guidance needs."""
    flip: float = 0.5
    """Share of images that are mirrored. Sampled latents (synth.store = "codes") never are: a mirrored latent decodes
    to no mirrored image."""

    def __post_init__(self) -> None:
        for name in ("dropout", "label_drop", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


class XAR(Family[XARTransformer, XARObjective, XARSampling]):
    """Codes: moments of an image and of its mirror image (B, 2, 32, 16, 16), or sampled latents (B, 16, 16, 16)."""

    name = "xar"
    sampling = XARSampling
    objective = XARObjective
    trainable_autoencoder = TrainableKL16()

    def __init__(self) -> None:
        self._autoencoder: KL16 | None = None

    compiled = (Block,)

    def build(self, arch: Mapping[str, object]) -> XARTransformer:
        return XARTransformer(binding.build(XARArch, arch, "arch"))

    def arch_of(self, checkpoint: Checkpoint) -> dict[str, object]:
        """Read off the shapes where the file does not say: the published ones do not."""
        return asdict(read_arch(metas(checkpoint.tensors))) if checkpoint.arch is None else checkpoint.arch

    def load(self, checkpoint: Checkpoint) -> XARTransformer:
        """Also verifies the stored mask and rotary tables against the derived ones."""
        model = self.build(self.arch_of(checkpoint))
        derived = {name: buffer.clone() for name, buffer in model.named_buffers()}
        checkpoint.load_into(model)
        for name, buffer in model.named_buffers():
            if not torch.allclose(buffer, derived[name], rtol=0, atol=BUFFER_TOLERANCE):
                raise ValueError(
                    f"{checkpoint.path}: the table {name!r} is not that of an xAR model with 2 x 2 cells of 8 x 8 "
                    "tokens; "
                    "the file belongs to another network, or a merge has damaged it"
                )
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

    def sample(self, model: XARTransformer, rng: Rng, labels: Tensor | None, how: XARSampling) -> tuple[Tensor, Tensor]:
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

    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: XARObjective) -> Draws:
        draws: Draws = {}
        if is_moments(codes):
            draws["flipped"] = rng.uniform(()) < how.flip
            draws["posterior_noise"] = rng.normal((CHANNELS, GRID, GRID))
        draws["label_dropped"] = rng.uniform(()) < how.label_drop
        draws["times"] = rng.normal((NUM_CELLS,), torch.float64).sigmoid().float()  # logit-normal, one per cell
        draws["noise"] = rng.normals(NUM_CELLS, (CELL_TOKENS, CHANNELS)).transpose(0, 1)
        return draws

    def loss(
        self, model: XARTransformer, codes: Tensor, labels: Tensor | None, draws: Draws, how: XARObjective
    ) -> Tensor:
        if labels is None:
            raise ValueError("xAR is trained with class labels; this set of images has none")
        labels = torch.where(draws["label_dropped"], model.num_classes, labels)
        latents = self._latents(codes, draws)
        return velocity_loss(model, latents, labels, times=draws["times"], noise=draws["noise"], dropout=how.dropout)

    def _latents(self, codes: Tensor, draws: Draws) -> Tensor:
        if not is_moments(codes):
            return codes
        moments = torch.where(draws["flipped"][:, None, None, None], codes[:, 1], codes[:, 0])
        return self.autoencoder.to_latents(moments, draws["posterior_noise"])

    def img_size(self, model: XARTransformer) -> int:
        return GRID * self.autoencoder.layout.downsampling

    def num_classes(self, model: XARTransformer) -> int:
        return model.num_classes

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Everything but vectors and biases: the class and position embeddings decay too, as published."""
        return parameter.ndim > 1 and not name.endswith(".bias")


def read_autoencoder(path: Path) -> KL16:
    """The autoencoder of a file: the published `kl16.ckpt`, or one of `neon train-autoencoder`, whose file states its
    sizes."""
    found = read(path, weights="any")
    autoencoder = KL16(binding.build(KL16Arch, found.arch or {}, "arch"))
    found.load_into(autoencoder)
    return autoencoder


def is_moments(codes: Tensor) -> bool:
    """Whether codes come from `encode` (stored images) rather than from `sample`."""
    return codes.ndim == 5


FAMILY = XAR
