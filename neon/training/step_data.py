"""What a training step works on: images and random numbers, pure functions of (seed, step).

Order and draws are made for the whole global batch and do not depend on the number of ranks; a rank reads its share.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from neon import contract, first_batch
from neon.family import Draws, Trainable
from neon.runtime.distributed import World
from neon.seeds import SharedRng, derived_seed
from neon.store.shards import Corpus
from neon.training.recipe import Training


@dataclass(frozen=True)
class StepData:
    """A rank's share of a step's global batch, on the CPU: codes (B, ...), labels (B,) or None, and every random
    number of these images."""

    codes: Tensor
    labels: Tensor | None
    draws: Draws


def step_data(family: Trainable, recipe: Training, step: int, corpus: Corpus, world: World) -> StepData:
    """What this rank trains on in step `step`."""
    indices = batch_indices(recipe.seed, step, recipe.batch, len(corpus))
    labels = None if corpus.labels is None else corpus.labels[indices]
    share = share_of(recipe, world, group_of(family, recipe))
    if family.draws_see_codes(recipe.objective):
        batch = corpus.read(indices.tolist())
        codes = batch[share]
    else:
        is_empty = share.start == share.stop  # then one image is read for its shape and dtype
        codes = corpus.read(indices[:1].tolist())[:0] if is_empty else corpus.read(indices[share].tolist())
        batch = codes.new_empty((recipe.batch, *codes.shape[1:]), device="meta")
    draws = step_draws(family, recipe, step, batch, labels)
    own = {name: value[share] for name, value in draws.items()}
    return StepData(codes, None if labels is None else labels[share], own)


def group_of(family: Trainable, recipe: Training) -> int:
    """How many consecutive images have their loss computed together. Raises ValueError for what is no such number."""
    return contract.count(f"{type(family).__name__}.group", family.group(recipe.objective), least=1)


def check_groups(section: str, family: Trainable, recipe: Training) -> None:
    """Raise ValueError if a batch of the recipe would split images whose loss is computed together."""
    group = group_of(family, recipe)
    for name, value in (("batch", recipe.batch), ("micro_batch", recipe.micro_batch)):
        if value is not None and value % group:
            raise ValueError(
                f"{section}.{name} must be a multiple of {group}, the images whose loss is computed together; "
                f"got {value}"
            )


def share_of(recipe: Training, world: World, group: int) -> slice:
    """The positions in the global batch that are this rank's, in whole groups of images."""
    start, stop = (recipe.batch // group * r // world.size * group for r in (world.rank, world.rank + 1))
    return slice(start, stop)


def batch_indices(seed: int, step: int, batch: int, num_images: int) -> Tensor:
    """Indices of the global batch of a step: epochs are seeded permutations, batches run across their borders."""
    positions = torch.arange(step * batch, (step + 1) * batch)
    epochs = positions // num_images
    indices = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        chosen = epochs == epoch
        indices[chosen] = _epoch_order(seed, epoch, num_images)[positions[chosen] % num_images]
    return indices


@lru_cache(maxsize=2)  # the steps of an epoch share it, and a batch may run across the border of two
def _epoch_order(seed: int, epoch: int, num_images: int) -> Tensor:
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch)))


def step_draws(family: Trainable, recipe: Training, step: int, codes: Tensor, labels: Tensor | None) -> Draws:
    """Every random number of a step of the global batch, drawn on the CPU. Raises ValueError if a family without
    `draws_see_codes` used their values."""
    generator = torch.Generator().manual_seed(derived_seed(recipe.seed, "draws", step))
    try:
        draws = family.draw(SharedRng(len(codes), generator), codes, labels, recipe.objective)
    except RuntimeError as error:
        if codes.is_meta and "meta" in str(error).lower():
            raise ValueError(_unseen(family)) from error
        raise
    first_batch.drawn(type(family).__name__, draws, len(codes))
    if any(value.is_meta for value in draws.values()):
        raise ValueError(_unseen(family))
    return draws


def _unseen(family: Trainable) -> str:
    return (
        f"{type(family).__name__}.draw computes with the values of the codes, but is given only their shape and dtype. "
        "Let its method `draws_see_codes` return True"
    )


class OneStepAhead:
    """Makes the next step's data in a thread while the device works on this one's: on a GPU, drawing noise on the CPU
    would cost as much as the step of a small network."""

    def __init__(self, family: Trainable, recipe: Training, corpus: Corpus, world: World):
        self._make = partial(step_data, family, recipe, corpus=corpus, world=world)
        self._recipe = recipe
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._next: tuple[int, Future[StepData]] | None = None

    def take(self, step: int) -> StepData:
        """The data of `step`; the next step's are begun, unless `step` is the recipe's last."""
        is_ready = self._next is not None and self._next[0] == step
        ready = self._next[1].result() if is_ready and self._next is not None else self._make(step)
        is_last = (step + 1) * self._recipe.batch >= self._recipe.images
        self._next = None if is_last else (step + 1, self._pool.submit(self._make, step + 1))
        return ready

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
