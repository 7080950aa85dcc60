"""What a training step works on: the global batch and every random number, pure functions of (seed, step)."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from neon.family import Draws, Trainable
from neon.seeds import SharedRng, derived_seed
from neon.store.shards import Corpus
from neon.training.recipe import Training


@dataclass(frozen=True)
class StepData:
    """The global batch of a step, on the CPU: codes (B, ...), labels (B,) or None, and every random number."""

    codes: Tensor
    labels: Tensor | None
    draws: Draws


def step_data(family: Trainable, recipe: Training, step: int, corpus: Corpus) -> StepData:
    """What step `step` trains on."""
    indices = batch_indices(recipe.seed, step, recipe.batch, len(corpus))
    codes = corpus.read(indices.tolist())
    labels = None if corpus.labels is None else corpus.labels[indices]
    return StepData(codes, labels, step_draws(family, recipe, step, codes, labels))


def batch_indices(seed: int, step: int, batch: int, num_images: int) -> Tensor:
    """Indices of the global batch of a step: epochs are seeded permutations, batches run across their borders."""
    positions = torch.arange(step * batch, (step + 1) * batch)
    epochs = positions // num_images
    indices = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch)))
        chosen = epochs == epoch
        indices[chosen] = order[positions[chosen] % num_images]
    return indices


def step_draws(family: Trainable, recipe: Training, step: int, codes: Tensor, labels: Tensor | None) -> Draws:
    """Every random number of a step of the global batch, drawn on the CPU."""
    generator = torch.Generator().manual_seed(derived_seed(recipe.seed, "draws", step))
    return family.draw(SharedRng(len(codes), generator), codes, labels, recipe.objective)


class OneStepAhead:
    """Makes the next step's data in a thread while the device works on this one's: on a GPU, drawing noise on the CPU
    would cost as much as the step of a small network."""

    def __init__(self, family: Trainable, recipe: Training, corpus: Corpus):
        self._make = partial(step_data, family, recipe, corpus=corpus)
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
