"""The order of training data: a pure function of (seed, step)."""

import torch

from neon.seeds import derived_seed
from neon.training.step_data import batch_indices


def test_epochs_are_seeded_permutations_and_batches_run_across_their_borders():
    """Asked for in any order, as a resumed run does."""
    seed, batch, images = 3, 8, 21
    epochs = [
        torch.randperm(images, generator=torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch)))
        for epoch in range(8)
    ]
    steps = torch.cat(epochs).split(batch)
    for step in (0, 1, 2, 3, 20, 2, 19, 0):
        assert torch.equal(batch_indices(seed, step, batch, images), steps[step])
    assert torch.equal(batch_indices(seed, 0, 50, images), torch.cat(epochs)[:50])
    assert not torch.equal(batch_indices(4, 0, batch, images), steps[0])


def test_what_a_caller_does_to_the_indices_changes_no_later_step():
    first = batch_indices(0, 0, 10, 10)
    kept = first.clone()
    first.zero_()
    assert torch.equal(batch_indices(0, 0, 10, 10), kept)
