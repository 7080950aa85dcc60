"""The Frechet distance against closed forms."""

import math

import pytest
import torch
from scipy.linalg import lapack

from fid.frechet import Gaussian, frechet_distance
from fid.moments import Moments


def diagonal(mean: list[float], variances: list[float]) -> Gaussian:
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.diag(torch.tensor(variances, dtype=torch.float64)))


def covariance(dim: int, rank: int, *, seed: int, decay: float = 1.0) -> torch.Tensor:
    """Random, of the given rank, with standard deviations falling like a power of the index."""
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(rank + 1, dim, generator=generator, dtype=torch.float64)
        * torch.arange(1, dim + 1, dtype=torch.float64) ** -decay
    )
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    return torch.cov((x @ rotation).T)


def test_diagonal_gaussians_of_which_one_is_singular():
    one, two = diagonal([1, 0, 2], [4, 1, 0]), diagonal([0, 0, 0], [1, 9, 0])
    want = 5 + (2 - 1) ** 2 + (1 - 3) ** 2  # |mu|^2 + sum (sqrt a - sqrt b)^2
    assert frechet_distance(generated=one, reference=two) == pytest.approx(want, abs=1e-12)
    assert frechet_distance(generated=two, reference=one) == pytest.approx(want, abs=1e-12)


def test_two_points():
    """Covariances of rank 0: only the means count."""
    assert frechet_distance(generated=diagonal([3, 0], [0, 0]), reference=diagonal([0, 4], [0, 0])) == pytest.approx(
        25, abs=1e-12
    )


def test_common_rotation_and_noncommuting_covariances():
    """In two dimensions tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)) (Cayley-Hamilton): no eigenvalues needed."""
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    root_trace = math.sqrt((a @ b).trace() + 2 * math.sqrt(torch.linalg.det(a) * torch.linalg.det(b)))
    want = float(a.trace() + b.trace()) - 2 * root_trace
    assert frechet_distance(generated=Gaussian(zero, a), reference=Gaussian(zero, b)) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("dim", "rank"), [(48, 200), (64, 20), (300, 120)])
def test_distance_to_itself_is_zero(dim, rank, decay):
    gaussian = Gaussian(torch.ones(dim), covariance(dim, rank, seed=0, decay=decay))
    twin = Gaussian(torch.ones(dim), gaussian.covariance.clone())
    assert 0 <= frechet_distance(generated=twin, reference=gaussian) < 1e-8


@pytest.mark.parametrize(("rank_a", "rank_b"), [(200, 200), (30, 200), (200, 30)])
def test_equals_the_nuclear_norm_and_is_symmetric(rank_a, rank_b):
    """tr (AB)^(1/2) is the sum of singular values of F_A^T F_B for any factors: here the data themselves."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n + 1, 64, generator=generator, dtype=torch.float64) for n in (rank_a, rank_b))
    f, g = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    want = (
        (x.mean(0) - y.mean(0)).square().sum()
        + f.square().sum()
        + g.square().sum()
        - 2 * torch.linalg.svdvals(f @ g.T).sum()
    )
    one, two = (Gaussian(z.mean(0), torch.cov(z.T), len(z)) for z in (x, y))
    assert frechet_distance(generated=one, reference=two) == pytest.approx(want.item(), rel=1e-11)
    assert frechet_distance(generated=two, reference=one) == pytest.approx(want.item(), rel=1e-11)


def test_a_covariance_rounded_to_float32_still_works():
    """Rounding makes small eigenvalues negative; published files exist in float32."""
    exact = covariance(128, 60, seed=3)
    rounded = exact.float()
    assert torch.linalg.eigvalsh(rounded.double())[0] < 0
    distance = frechet_distance(
        generated=Gaussian(torch.zeros(128), exact), reference=Gaussian(torch.zeros(128), rounded)
    )
    assert 0 <= distance < 1e-2 * exact.trace()


@pytest.mark.parametrize("power", [2.0, 4.0, 6.0])
def test_files_in_float32_keep_their_accuracy(power):
    """Commuting covariances, so the distance is sum (sqrt a - sqrt b)^2; their small eigenvalues drown in float32's
    rounding."""
    index = torch.arange(1, 301, dtype=torch.float64)
    a, b = index**-power, 1.3 * index**-power * (1 + 0.3 * index.sin())
    rotation = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[
        0
    ]
    exact, other = ((rotation * values) @ rotation.T for values in (a, b))
    mean, want = torch.zeros(300), (a.sqrt() - b.sqrt()).square().sum().item()
    assert frechet_distance(generated=Gaussian(mean, exact), reference=Gaussian(mean, other)) == pytest.approx(
        want, abs=1e-12
    )
    assert frechet_distance(generated=Gaussian(mean, exact), reference=Gaussian(mean, other.float())) == pytest.approx(
        want, abs=2e-7
    )


def test_finite_sample_bias_of_a_one_dimensional_gaussian():
    """Two sets of the same distribution: the distance is small, positive and falls about like 1/n."""
    generator = torch.Generator().manual_seed(0)
    reference = Gaussian(torch.zeros(16), torch.eye(16))

    def distance(n: int) -> float:
        moments = Moments(16)
        moments.update(torch.randn(n, 16, generator=generator, dtype=torch.float64))
        return frechet_distance(generated=moments.gaussian(), reference=reference)

    small, large = (sum(distance(n) for _ in range(8)) / 8 for n in (500, 2000))
    assert 3 < small / large < 5.5


def test_the_references_factor_is_computed_once(monkeypatch):
    calls = []
    dpstrf = lapack.dpstrf
    monkeypatch.setattr(lapack, "dpstrf", lambda *args, **kwargs: calls.append(1) or dpstrf(*args, **kwargs))
    reference = Gaussian(torch.zeros(8), covariance(8, 20, seed=1))
    for seed in range(3):
        frechet_distance(generated=Gaussian(torch.zeros(8), covariance(8, 20, seed=seed)), reference=reference)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("mean", "matrix", "message"),
    [
        (torch.zeros(3), torch.eye(2), "expected mean"),
        (torch.zeros(2), torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "NaN"),
        (torch.zeros(2), torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "symmetric"),
    ],
)
def test_what_is_no_gaussian_is_refused(mean, matrix, message):
    with pytest.raises(ValueError, match=message):
        Gaussian(mean, matrix)


def test_other_dimensions_are_refused():
    with pytest.raises(ValueError, match="2 features, the reference 3"):
        frechet_distance(generated=diagonal([0, 0], [1, 1]), reference=diagonal([0, 0, 0], [1, 1, 1]))
