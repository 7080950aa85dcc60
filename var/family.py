"""VAR as a Neon family: codes are the token maps of the multi-scale VQ-VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neon import config_table
from neon.family import Draws, Family
from neon.quantize import from_uint8
from neon.seeds import ImageRng, Rng
from var.crops import resized_crops, resized_size
from var.derived import check_derived
from var.load import read_tokeniser, transformer_arch_of
from var.loss import token_loss
from var.options import Objective, Sampling
from var.presets import PATCH_NUMS
from var.sampler import sample_scales
from var.trainable_autoencoder import TrainableVQVAE
from var.transformer import Block, Transformer, VARArch
from var.vqvae import VQVAE

if TYPE_CHECKING:
    from neon.checkpoints.checkpoint import Checkpoint


class VAR(Family[Transformer, Objective, Sampling]):
    """Codes: tokens (B, L) int64; with more_smooth, whose images have no tokens, features (B, Z, S, S)."""

    name = "var"
    sampling = Sampling
    objective = Objective
    trainable_autoencoder = TrainableVQVAE()
    compiled = (Block,)
    graphed_method = "next_logits"
    replayed = ("exact",)  # compiled blocks in graphs were not measured

    def graphed(self, model: Transformer) -> Transformer:
        return model

    def __init__(self) -> None:
        self._tokeniser: VQVAE | None = None

    def build(self, arch: Mapping[str, object]) -> Transformer:
        return Transformer(config_table.build(VARArch, arch, "arch"))

    def arch_of(self, checkpoint: Checkpoint) -> Mapping[str, object]:
        return transformer_arch_of(checkpoint.tensors) if checkpoint.arch is None else checkpoint.arch

    def load(self, checkpoint: Checkpoint) -> Transformer:
        """Also checks the tables that a file stores beside its parameters: merges by the original code damage them."""
        model = checkpoint.filled(self.build, self.arch_of(checkpoint))
        check_derived(model.patch_nums, checkpoint.tensors, checkpoint.path)
        return model

    def open(self, autoencoder: Path | None, device: torch.device) -> None:
        if autoencoder is None:
            raise ValueError(
                "VAR works on tokens: name its autoencoder, base.autoencoder (published: vae_ch160v4096z32.pth)"
            )
        self.use(read_tokeniser(autoencoder).to(device))
        self.tokeniser().encoder.cpu()  # used when training on images only: `loss` then moves it to the device

    def use(self, tokeniser: VQVAE) -> None:
        """Work with a tokeniser that is in memory already."""
        self._tokeniser = tokeniser.eval().requires_grad_(False)

    def tokeniser(self, patch_nums: tuple[int, ...] | None = None) -> VQVAE:
        """The tokeniser, set to these scales: one published file serves 256 and 512 px."""
        if self._tokeniser is None:
            raise ValueError(
                "VAR needs its tokeniser here: name it as base.autoencoder (published: vae_ch160v4096z32.pth)"
            )
        quantizer = self._tokeniser.quantize
        if patch_nums is not None and len(patch_nums) != len(quantizer.patch_nums):
            raise ValueError(
                f"the tokeniser has {len(quantizer.patch_nums)} scales, the transformer {len(patch_nums)}; they do "
                "not belong together"
            )
        quantizer.patch_nums = patch_nums or quantizer.patch_nums
        return self._tokeniser

    def autoencoder_modules(self) -> list[nn.Module]:
        return [] if self._tokeniser is None else [self._tokeniser]

    def sample(self, model: Transformer, rng: Rng, labels: Tensor | None, how: Sampling) -> tuple[Tensor, Tensor]:
        labels = rng.uniform_class(model.num_classes) if labels is None else labels
        indices = []
        for scale in sample_scales(model, self.tokeniser(model.patch_nums).quantize, rng, labels, how):
            indices.append(scale.indices)
        return scale.f_hat if how.more_smooth else torch.cat(indices, dim=1), labels

    def decode(self, codes: Tensor) -> Tensor:
        tokeniser, f_hat = self.tokeniser(), codes
        if not codes.is_floating_point():
            patch_nums = scales_of(codes.shape[1], tokeniser.quantize.patch_nums)
            with torch.autocast(codes.device.type, enabled=False):
                f_hat = tokeniser.quantize.features_of(split_scales(codes, patch_nums))
        return tokeniser.decode(f_hat)

    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: Objective) -> Draws:
        draws: Draws = {"label_dropped": rng.uniform(()) < how.label_drop}
        # a seed per image: `loss` draws from it, because only the network knows how many blocks there are
        draws["path_seed"] = rng.integers(1 << 32)
        if is_images(codes):
            side = min(codes.shape[2:])
            height, width = resized_size(codes.shape[2], codes.shape[3], round(how.resize * side))
            draws["flipped"] = rng.uniform(()) < how.flip
            draws["top"], draws["left"] = rng.integers(height - side + 1), rng.integers(width - side + 1)
        return draws

    def loss(self, model: Transformer, codes: Tensor, labels: Tensor | None, draws: Draws, how: Objective) -> Tensor:
        tokeniser = self.tokeniser(model.patch_nums)
        with torch.no_grad(), torch.autocast(codes.device.type, enabled=False):
            indices = self._indices(tokeniser, codes, draws, how)
            features = tokeniser.quantize.teacher_input(indices)
        no_class = torch.full((len(codes),), model.num_classes, device=codes.device)
        labels = no_class if labels is None else torch.where(draws["label_dropped"], no_class, labels)
        drops_paths = model.training and any(block.drop_path for block in model.stack)
        kept = draw_paths(model, draws["path_seed"]) if drops_paths else None
        logits = model(labels, features, kept)
        return token_loss(logits, torch.cat(indices, dim=1), label_smoothing=how.label_smoothing)

    def _indices(self, tokeniser: VQVAE, codes: Tensor, draws: Draws, how: Objective) -> list[Tensor]:
        patch_nums = tokeniser.quantize.patch_nums
        if not is_images(codes):
            return split_scales(codes, patch_nums)
        tokeniser.encoder.to(codes.device)
        side = min(codes.shape[2:])
        crops = resized_crops(
            codes,
            shorter=round(how.resize * side),
            side=side,
            top=draws["top"],
            left=draws["left"],
            is_flipped=draws["flipped"],
        )
        return tokeniser.image_to_indices(from_uint8(crops))

    def img_size(self, model: Transformer) -> int:
        encoder = self.tokeniser(model.patch_nums).encoder
        return model.patch_nums[-1] * 2 ** (len(encoder.down) - 1)

    def num_classes(self, model: Transformer) -> int:
        return model.num_classes

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """As published (with the rate 0): no decay of vectors, biases, positions, levels, gammas and temperatures."""
        return parameter.ndim > 1 and not name.endswith("bias") and not any(word in name for word in UNDECAYED)


UNDECAYED = ("pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul")


def is_images(codes: Tensor) -> bool:
    """Whether codes are stored images, to be tokenised, rather than tokens from `sample`."""
    if codes.dtype not in (torch.uint8, torch.int64):
        raise ValueError(
            f"VAR trains on uint8 images or int64 tokens, found {codes.dtype}; images drawn with more_smooth have no "
            'tokens: store them with synth.store = "images"'
        )
    return codes.dtype == torch.uint8


def split_scales(tokens: Tensor, patch_nums: Sequence[int]) -> list[Tensor]:
    """(B, L) -> the (B, l) of every scale."""
    return list(tokens.split([side * side for side in patch_nums], dim=1))


def scales_of(num_tokens: int, patch_nums: Sequence[int]) -> Sequence[int]:
    """The scales that have this many tokens in all: the tokeniser's own, or those of a published resolution."""
    for candidate in (patch_nums, *PATCH_NUMS.values()):
        if sum(side * side for side in candidate) == num_tokens:
            return candidate
    raise ValueError(
        f"{num_tokens} tokens fit neither the tokeniser's scales {list(patch_nums)} nor those of a published resolution"
    )


def draw_paths(model: Transformer, seeds: Tensor) -> Tensor:
    """(B, depth, 2) bool: which branches survive stochastic depth, by one stream per image. seeds: (B,) int64."""
    rates = torch.tensor([block.drop_path for block in model.stack])
    kept = ImageRng(seeds.tolist()).uniform((len(rates), 2)) >= rates[:, None]
    return kept.to(seeds.device)


FAMILY = VAR
