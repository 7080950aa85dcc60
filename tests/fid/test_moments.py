"""Moments against numpy, for every way to split the images."""

import numpy as np
import pytest
import torch

from fid.moments import Moments

DIM = 24


def features(n: int = 997, *, offset: float = 0.4, seed: int = 0) -> torch.Tensor:
    """float32, correlated, with a mean `offset` standard deviations or so away from zero."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, DIM, generator=generator) @ torch.randn(DIM, DIM, generator=generator) / DIM**0.5 + offset
    ).float()


def moments_of(batches) -> Moments:
    moments = Moments(DIM)
    for batch in batches:
        moments.update(batch)
    return moments


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("offset", [0.4, 300.0])
@pytest.mark.parametrize("batch", [1, 7, 64, 997, 5000])
def test_any_batch_size_gives_numpys_covariance(batch, offset):
    x = features(offset=offset)
    moments = moments_of(x.split(batch))
    exact = x.double() - offset  # numpy loses digits to a large mean as well
    assert moments.count == 997
    assert relative(moments.mean, exact.mean(0) + offset) < 1e-12
    assert relative(moments.covariance, torch.from_numpy(np.cov(exact.numpy(), rowvar=False))) < 1e-10


@pytest.mark.parametrize("offset", [0.4, 300.0])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_sums_over_ranks_and_merging_give_the_same(world, offset):
    x = features(offset=offset)
    whole = moments_of([x])
    ranks = [moments_of(x[rank::world].split(50)) for rank in range(world)]
    sums = {name: sum(rank.tensors()[name] for rank in ranks) for name in ("count", "sum", "second")}
    reduced = Moments.from_tensors(sums)
    merged = Moments(DIM)
    for rank in ranks:
        merged.merge(rank)
    for found in (reduced, merged):
        assert found.count == 997
        assert relative(found.mean, whole.mean) < 1e-12
        assert relative(found.covariance, whole.covariance) < 1e-10


def test_a_rank_without_images_changes_nothing():
    x = features()
    whole, idle = moments_of([x]), Moments(DIM)
    idle.update(x[:0])
    merged = moments_of([x])
    merged.merge(idle)
    assert torch.equal(merged.covariance, whole.covariance)
    sums = {name: value + idle.tensors()[name] for name, value in whole.tensors().items()}
    assert relative(Moments.from_tensors(sums).covariance, whole.covariance) < 1e-13


def test_state_continues_bit_for_bit():
    x = features()
    unbroken = moments_of(x.split(100))
    first = moments_of(x[:400].split(100))
    resumed = Moments.from_state(first.state())
    for batch in x[400:].split(100):
        resumed.update(batch)
    assert resumed.count == unbroken.count
    assert torch.equal(resumed.mean, unbroken.mean)
    assert torch.equal(resumed.covariance, unbroken.covariance)


def test_one_missing_image_shows():
    x = features()
    assert relative(moments_of([x[1:]]).covariance, moments_of([x]).covariance) > 1e-5


def test_too_few_images():
    moments = moments_of([features()[:1]])
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments.gaussian()
    with pytest.raises(ValueError, match="no images"):
        _ = Moments(DIM).mean


def test_bad_features_are_refused():
    moments = Moments(DIM)
    with pytest.raises(ValueError, match=rf"\(B, {DIM}\)"):
        moments.update(torch.zeros(4, DIM + 1))
    broken = features()[:8].clone()
    broken[3, 2], broken[5, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="2 of 8 feature vectors"):
        moments.update(broken)
    assert moments.count == 0
    with pytest.raises(ValueError, match="cannot merge"):
        moments.merge(Moments(DIM + 1))
    with pytest.raises(ValueError, match="second missing"):
        Moments.from_tensors({"count": torch.ones(1), "sum": torch.zeros(DIM)})
