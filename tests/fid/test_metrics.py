"""Inception Score, KID and FID-infinity against closed forms; the names of metrics."""

import math

import numpy as np
import pytest
import torch

from fid.frechet import Gaussian, frechet_distance
from fid.infinity import frechet_infinity
from fid.metrics import cautions, inception_score, kernel_distance, kernel_distance_unbiased, metric_name
from fid.moments import Moments
from tests.quarters_extractor import Quarters


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("fid", 50_000, "inception-2015-12-05"), "fid50k[inception-2015-12-05]"),
        (("fd", 2_000, "fashion-cnn"), "fd2k[fashion-cnn]"),
        (("is", 1_500, "x"), "is1500[x]"),
        (("fid", 999, "x"), "fid999[x]"),
        (("kid", 500, "x", None, 100), "kid500[x,subset=100]"),
        (("kid", 5_000, "x", None, 1000), "kid5k[x]"),
        (("precision", 10_000, "inception-2015-12-05", 5), "precision10k[inception-2015-12-05,k=5]"),
    ],
)
def test_names(arguments, name):
    assert metric_name(*arguments) == name


def test_names_say_k_where_there_is_one():
    with pytest.raises(ValueError, match="recall needs its k"):
        metric_name("recall", 1000, "x")
    with pytest.raises(ValueError, match="fid has no k"):
        metric_name("fid", 1000, "x", 3)


def test_cautions():
    stub = Quarters()
    assert cautions({"fd1k[quarters]": 2.0}, num_images=1000, extractor=stub) == []
    assert cautions({"fd1k[quarters]": 2.0, "is1k[quarters]": 1e-9}, num_images=1000, extractor=stub) == []
    assert "singular" in cautions({"fd8[quarters]": 40.0}, num_images=8, extractor=stub)[0]
    assert "identical" in cautions({"fd1k[quarters]": 1e-5}, num_images=1000, extractor=stub)[0]


def test_a_reference_of_few_images_is_said():
    few = {"num_images": 1000, "extractor": Quarters(), "reference_images": 12}
    for name in ("fd1k[quarters]", "fd_inf1k[quarters]"):
        (note,) = cautions({name: 2.0}, **few)
        assert "the reference is made of 12 images for 12 features" in note
    assert cautions({"is1k[quarters]": 2.0}, **few) == []
    assert cautions({"fd1k[quarters]": 2.0}, **{**few, "reference_images": 13}) == []


def test_a_small_extrapolated_distance_is_not_taken_for_the_distance():
    """fd_inf of two equal sets is about 0, and may be negative: that says nothing of identical images."""
    assert cautions({"fd_inf1k[quarters]": -0.1}, num_images=1000, extractor=Quarters()) == []
    assert (
        "parts of 8 images, which is not more than the 12 features"
        in cautions({"fd_inf35[quarters]": 2.0}, num_images=35, extractor=Quarters())[0]
    )


def test_inception_score_of_certain_and_balanced_predictions():
    """p(y|x) one class per image, 8 classes equally often: exp(KL) = 8 when every split has all of them."""
    labels = torch.arange(8).repeat(10_000)
    logits = torch.nn.functional.one_hot(labels, 8).float() * 100
    score = inception_score(logits)
    assert score.mean == pytest.approx(8, rel=1e-3)
    assert score.std < 5e-3
    assert inception_score(torch.zeros(100, 8)) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_does_not_depend_on_class_order():
    """Without the shuffle, class-sorted images give splits of one or two classes: 1.2 instead of about 10 here."""
    labels = torch.arange(10).repeat_interleave(1000)
    logits = torch.nn.functional.one_hot(labels, 10).float() * 9 + normal(10_000, 10)
    mixed = logits[torch.randperm(10_000, generator=torch.Generator().manual_seed(3))]
    assert inception_score(logits).mean == pytest.approx(inception_score(mixed).mean, rel=2e-3)
    assert inception_score(logits).mean > 9


@pytest.mark.parametrize("count", [9, 10, 49])
def test_inception_score_needs_images_in_every_split(count):
    """In a split of one image p(y) = p(y|x): the score would be 1 for any images."""
    with pytest.raises(ValueError, match=f"at least 50 images .* got {count}"):
        inception_score(100 * torch.eye(count))
    assert inception_score(100 * torch.eye(50)).mean == pytest.approx(5)


def test_kernel_distance_by_hand():
    """D = 1: k(x, y) = (xy + 1)^3. generated {0, 1}, reference {0, 2}: 1 + 1 - 2 (1 + 1 + 1 + 27) / 4 = -13."""
    generated, reference = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    assert kernel_distance_unbiased(generated=generated, reference=reference) == pytest.approx(-13, abs=1e-12)


def test_kernel_distance_does_not_depend_on_the_blocks():
    generated, reference = normal(300, 600), 1.1 * normal(40_000, 600, seed=1)[:311]
    one = kernel_distance_unbiased(generated=generated, reference=reference)
    assert kernel_distance_unbiased(generated=generated, reference=reference, budget_mib=0) == pytest.approx(
        one, rel=1e-10
    )


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    same, shifted = [], []
    for seed in range(40):
        x, y = normal(200, 8, seed=seed), normal(200, 8, seed=1000 + seed)
        same.append(kernel_distance_unbiased(generated=x, reference=y))
        shifted.append(kernel_distance_unbiased(generated=x + 0.3, reference=y))
    mean, error = torch.tensor(same).mean(), torch.tensor(same).std() / math.sqrt(len(same))
    assert abs(mean) < 3 * error
    assert min(same) < 0 < min(shifted)


def test_kernel_distance_over_subsets():
    x, y = normal(500, 8), normal(400, 8, seed=1) + 0.2
    subsets = kernel_distance(generated=x, reference=y, subsets=50, subset_size=100)
    full = kernel_distance_unbiased(generated=x, reference=y)
    assert subsets.mean == pytest.approx(full, abs=4 * subsets.std / math.sqrt(50))
    rng = np.random.RandomState(2020)
    drawn = [(rng.choice(500, 100, replace=False), rng.choice(400, 100, replace=False)) for _ in range(50)]
    values = [kernel_distance_unbiased(generated=x[i], reference=y[j]) for i, j in drawn]  # in float64
    assert subsets == pytest.approx((np.mean(values), np.std(values)), rel=1e-5)
    with pytest.raises(ValueError, match="that many images in both sets, got 400: give a smaller subset"):
        kernel_distance(generated=x, reference=y)


def test_extrapolation_finds_the_exact_distance():
    """N(0.1, 1.2^2 I) against N(0, I) in 24 dimensions: D (0.1^2 + 0.2^2) = 1.2, of which 800 images show a third too
    much."""
    dim, reference = 24, Gaussian(torch.zeros(24), torch.eye(24))
    exact = dim * (0.1**2 + 0.2**2)
    z_scores, biases = [], []
    for seed in range(6):
        features = 0.1 + 1.2 * normal(800, dim, seed=seed)
        found = frechet_infinity(generated=features, reference=reference)
        moments = Moments(dim)
        moments.update(features)
        assert found.distances[0] == pytest.approx(
            frechet_distance(generated=moments.gaussian(), reference=reference), rel=1e-9
        )
        assert found.sizes == (800, 400, 266, 200)
        z_scores.append((found.value - exact) / found.error)
        biases.append(found.distances[0] - exact)
    z = torch.tensor(z_scores)
    assert abs(z.mean()) < 1.5  # with an honest error bar the mean of six is within 0.4 of 0
    assert 0.3 < z.square().mean().sqrt() < 2.5
    assert sum(biases) / 6 > 0.15


def test_extrapolation_needs_images():
    with pytest.raises(ValueError, match="needs more than 15 images"):
        frechet_infinity(generated=torch.zeros(15, 2), reference=Gaussian(torch.zeros(2), torch.eye(2)))
