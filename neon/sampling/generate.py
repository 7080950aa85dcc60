"""The one loop that makes images: seeds and labels in, codes or uint8 images out, the same for any batch and world
size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neon import contract, first_batch
from neon.family import Family
from neon.networks import autoencoder
from neon.quantize import to_uint8
from neon.runtime.precision import AUTOCAST, arithmetic, weights_cast_once
from neon.runtime.speed import accelerated
from neon.sampling.options import Labels, Sampling
from neon.seeds import image_rng


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything that decides what image i of a block looks like, besides the weights."""

    family: Family
    sampling: Sampling
    labels: Labels
    first_seed: int
    num_classes: int
    """Of the network; 0 if it takes no labels."""
    cfg_scale: float | None = None
    first_label: int = 0
    """Class of image 0 where labels are balanced."""

    @property
    def options(self) -> object:
        """The family's sampling options at this cfg_scale."""
        if self.cfg_scale is None:
            return self.sampling.options
        return self.family.with_guidance(self.sampling.options, self.cfg_scale)


@dataclass(frozen=True)
class Batch:
    """Images `indices` of a block: codes (B, ...) as the sampler made them, labels (B,) int64 or None."""

    indices: Sequence[int]
    codes: Tensor
    labels: Tensor | None


def generate(
    source: Source, model: nn.Module, batches: Iterable[Sequence[int]], device: torch.device
) -> Iterator[Batch]:
    """Sample the images of `batches` (indices within the block; image i has seed first_seed + i)."""
    model.eval()
    if source.sampling.channels_last or source.sampling.speed != "exact":
        for network in (model, *_autoencoder(source.family)):
            network.to(memory_format=torch.channels_last)
    yield from _generate(source, model, batches, device)


@torch.inference_mode()  # without the move above: it would make parameters that nothing may change afterwards
def _generate(
    source: Source, model: nn.Module, batches: Iterable[Sequence[int]], device: torch.device
) -> Iterator[Batch]:
    for indices in batches:
        rng = image_rng(source.first_seed, indices, device, draw_on_device=source.sampling.draw_on == "device")
        labels = None
        if source.labels == "balanced" and source.num_classes:
            labels = torch.tensor([(source.first_label + i) % source.num_classes for i in indices], device=device)
        family, speed = source.family, source.sampling.speed
        with ExitStack() as stack:
            stack.enter_context(arithmetic(device, source.sampling.arithmetic))
            graphed = family.graphed(model) if speed in family.replayed else None
            is_replayed = stack.enter_context(
                accelerated(model, graphed, family.compiled, speed, family.graphed_method)
            )
            # a graph would outlive the copies, and compiled blocks cast for themselves
            if source.sampling.arithmetic in AUTOCAST and speed == "exact" and not is_replayed:
                stack.enter_context(weights_cast_once(model))
            returned = family.sample(model, rng, labels, source.options)
        yield Batch(indices, *first_batch.sampled(type(family).__name__, returned, len(indices), source.num_classes))


def _autoencoder(family: Family) -> list[nn.Module]:
    return contract.networks(f"{type(family).__name__}.autoencoder_modules", family.autoencoder_modules())


@torch.inference_mode()
def to_images(source: Source, codes: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) of the codes by the config's rounding rule; with "none", what the family decodes."""
    speed = source.sampling.speed
    with arithmetic(codes.device, source.sampling.arithmetic), ExitStack() as stack:
        for network in _autoencoder(source.family):
            stack.enter_context(accelerated(network, None, autoencoder.COMPILED, speed))
        images = source.family.decode(codes)
    if source.sampling.uint8 == "none":
        return images
    return to_uint8(first_batch.decoded(source.family.maker_of_images, images, len(codes)), source.sampling.uint8)
