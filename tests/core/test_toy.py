"""neon/toy against closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from fid.frechet import Gaussian, frechet_distance
from neon import reverse_merge
from neon.toy.autoregressive import Autoregressive
from neon.toy.diffusion import LAST_TIME, Diffusion, ExactDiffusion, signal
from neon.toy.experiment import (
    Curve,
    evaluation_noise,
    fine_tune,
    plane,
    random_control,
    score,
    self_train,
    sweep,
    train_base,
    w_grid,
)
from neon.toy.gradients import alignment, gradient, inner, score_gradient
from neon.toy.stack import num_parameters, repeat, split, stack
from neon.toy.target import COVARIANCE, density, distance, real_points
from neon.toy.warmup import WarmUp


def points_with(covariance: torch.Tensor, mean: torch.Tensor, num_points: int = 50) -> torch.Tensor:
    """(1, N, 2) float64 points whose sample mean and covariance are exactly these."""
    raw = torch.randn(num_points, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = raw - raw.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(raw.T)), raw.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T[None] + mean


def weights_of(model: Diffusion | Autoregressive, num_replicas: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    return model.fresh(num_replicas, torch.Generator().manual_seed(seed))


def constant_model(*, mean: float, log_std: float) -> dict[str, torch.Tensor]:
    """An autoregressive model whose conditionals are both N(mean, exp(log_std)^2) whatever came before."""
    weights = {name: torch.zeros_like(value) for name, value in weights_of(Autoregressive()).items()}
    weights["2.bias"] = torch.tensor([[[mean, log_std]]])
    return weights


def test_distance_of_a_scaled_and_shifted_target():
    """sqrt of the product of S and k^2 S is k S, so the distance is (k - 1)^2 tr S + |mean|^2."""
    for k, mean in ((1.0, (0.0, 0.0)), (0.7, (0.0, 0.0)), (1.5, (0.3, -0.4))):
        mean = torch.tensor(mean, dtype=torch.float64)
        want = (k - 1) ** 2 * 4 + mean.square().sum().item()
        assert distance(points_with(k**2 * COVARIANCE, mean)).item() == pytest.approx(want, abs=1e-9)


def test_distance_is_the_evaluators():
    """The closed form of the plane against fid's, for points that share no axis with the target."""
    mix = torch.tensor([[[0.3, -1.1], [0.8, 0.2]], [[2.0, 0.1], [0.4, 0.7]]])
    points = torch.randn(2, 500, 2, generator=torch.Generator().manual_seed(0)) @ mix + torch.tensor([0.3, -0.7])
    truth = Gaussian(torch.zeros(2), COVARIANCE)
    want = [frechet_distance(generated=Gaussian(x.mean(0), torch.cov(x.T)), reference=truth) for x in points.double()]
    assert distance(points).tolist() == pytest.approx(want, rel=1e-9)


def test_density_of_the_target():
    assert density(torch.zeros(2)).item() == pytest.approx(1 / (2 * math.pi * math.sqrt(3)))
    grid = torch.linspace(-9, 9, 181)
    points = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1)
    mass = density(points) * 0.1**2
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)
    assert (mass * points[..., 0] * points[..., 1]).sum().item() == pytest.approx(1, abs=1e-4)


def test_real_points_have_the_target_law_and_differ_between_replicas():
    real = real_points(2, 100_000, seed=0)
    assert distance(real).max() < 1e-3  # about 5 / N
    assert not torch.equal(real[0], real[1])


@pytest.mark.parametrize(("num_steps", "zeta"), [(1, 1.0), (10, 1.0), (10, 1.1), (7, 0.9)])
def test_exact_sampler_is_the_product_of_its_steps(num_steps, zeta):
    """Along an axis of variance v the exact noise is s x / (c^2 v + s^2), with c^2 = alpha_bar and s^2 = 1 - c^2."""
    times = torch.linspace(LAST_TIME, 0, num_steps + 1, dtype=torch.float64)
    for axis, variance in ((torch.tensor([[[1.0, 1.0]]]), 3.0), (torch.tensor([[[1.0, -1.0]]]), 1.0)):
        factor = 1.0
        for time, time_next in pairwise(times):
            c2, c2_next = signal(time).item(), signal(time_next).item()
            noise = zeta * math.sqrt(1 - c2) / (c2 * variance + 1 - c2)
            factor *= math.sqrt(c2_next / c2) * (1 - math.sqrt(1 - c2) * noise) + math.sqrt(max(1 - c2_next, 0)) * noise
        got = ExactDiffusion(num_steps=num_steps).sample({}, axis.double(), zeta)
        torch.testing.assert_close(got, factor * axis.double(), rtol=1e-9, atol=0)


def test_few_steps_and_a_larger_zeta_both_narrow_the_samples():
    """What the notebook calls mode-seeking, on the exact score: determinant of the samples' covariance against the
    truth's 3."""

    def spread(num_steps: int, zeta: float) -> float:
        return torch.linalg.det(torch.cov(ExactDiffusion(num_steps=num_steps).sample({}, noise, zeta)[0].T)).item()

    noise = points_with(torch.eye(2, dtype=torch.float64), torch.zeros(2))
    assert spread(10, 1.1) < spread(10, 1.0) < spread(20, 1.0) < 3 < spread(10, 0.9)
    assert spread(2000, 1.0) == pytest.approx(3, rel=0.03)


def test_schedule_is_the_published_cosine():
    assert signal(torch.tensor(0.0)).item() == pytest.approx(1)
    want = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert signal(torch.tensor(0.5)).item() == pytest.approx(want, rel=1e-5)


def test_diffusion_network_equals_torch_modules():
    model = Diffusion()
    weights = weights_of(model, 2)
    assert num_parameters(weights) == 4418
    assert num_parameters(weights_of(Autoregressive())) == 4482
    widths = [3, 32, 32, 32, 32, 32, 2]
    layers: list[nn.Module] = []
    for i in range(6):
        linear = nn.Linear(widths[i], widths[i + 1])
        linear.weight.data, linear.bias.data = weights[f"{i}.weight"][1].T, weights[f"{i}.bias"][1, 0]
        layers += [linear] if i in (0, 5) else [linear, nn.ReLU()]
    x = torch.randn(2, 7, 2, generator=torch.Generator().manual_seed(1))
    got = model.predict_noise(weights, x, torch.tensor(0.3))[1]
    torch.testing.assert_close(got, nn.Sequential(*layers)(torch.cat([x[1], torch.full((7, 1), 0.3)], dim=1)))


def test_diffusion_loss_of_a_silent_network_is_the_noise_power():
    weights = {name: torch.zeros_like(value) for name, value in weights_of(Diffusion()).items()}
    generator = torch.Generator().manual_seed(3)
    torch.rand(1, 50_000, 1, generator=generator)  # the times
    want = torch.randn(1, 50_000, 2, generator=generator).square().mean()
    got = Diffusion().loss(weights, torch.randn(1, 50_000, 2), torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, want[None])


def test_autoregressive_density_is_that_of_its_samples():
    """x = f(z) with z standard normal: log p(x) = log N(z) - log |det df/dz|, at temperature 1."""
    model, weights = Autoregressive(), {k: v.double() for k, v in weights_of(Autoregressive(), seed=4).items()}
    z = torch.tensor([0.4, -1.3], dtype=torch.float64)

    def f(z: torch.Tensor) -> torch.Tensor:
        return model.sample(weights, z[None, None], 1.0)[0, 0]

    jacobian = torch.autograd.functional.jacobian(f, z)
    want = -0.5 * z.square().sum() - math.log(2 * math.pi) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(model.log_density(weights, f(z)[None, None])[0, 0], want)


def test_temperature_scales_both_standard_deviations():
    z = points_with(torch.eye(2, dtype=torch.float64), torch.zeros(2))
    weights = {name: value.double() for name, value in constant_model(mean=0.2, log_std=0.3).items()}
    x = Autoregressive().sample(weights, z, 0.5)[0]
    torch.testing.assert_close(
        torch.cov(x.T), (0.5 * math.exp(0.3)) ** 2 * torch.eye(2, dtype=torch.float64), rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(x.mean(0), torch.full((2,), 0.2, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_replicas_do_not_touch_each_other():
    model, real = Autoregressive(), real_points(2, 300, seed=0)
    other = real.clone()
    other[1] *= 3
    a, b = (train_base(model, points, steps=5, lr=1e-3, seed=1) for points in (real, other))
    for name in a:
        assert torch.equal(a[name][0], b[name][0])
        assert not torch.equal(a[name][1], b[name][1])


def test_a_budget_is_a_snapshot_of_the_longer_run():
    model, real = Diffusion(), real_points(1, 300, seed=0)
    base = weights_of(model)
    both = fine_tune(model, base, real, budgets=(3, 6), lr=1e-4, seed=2)
    short = fine_tune(model, base, real, budgets=(3,), lr=1e-4, seed=2)
    assert all(torch.equal(both[3][name], short[3][name]) for name in base)
    assert any(not torch.equal(both[3][name], both[6][name]) for name in base)
    moved = max((both[3][name] - base[name]).abs().max().item() for name in base)
    assert 1e-4 < moved < 3.1e-4  # an Adam step is at most about lr


def test_training_learns_the_target():
    model = Autoregressive(ordinary=1.0)
    noise = evaluation_noise(4000, seed=7)
    before = score(model, weights_of(model, 1, seed=1), noise).item()
    after = score(model, train_base(model, real_points(1, 2000, seed=0), steps=300, lr=3e-3, seed=1), noise).item()
    assert before > 0.3
    assert after < 0.05


def test_self_training_returns_each_setting_under_its_own_name():
    """Temperature 0.3 must shrink the model and 2 must widen it."""
    model = Autoregressive(ordinary=1.0)
    base = train_base(model, real_points(2, 1000, seed=0), steps=200, lr=3e-3, seed=1)
    tuned = self_train(model, base, (0.3, 2.0), num_synthetic=1000, budgets=(100,), lr=1e-3, seed=3)[100]
    z = evaluation_noise(2000, seed=5).expand(2, -1, -1)
    narrow, normal, wide = (model.sample(weights, z).std(dim=1) for weights in (tuned[0.3], base, tuned[2.0]))
    assert (narrow < 0.9 * normal).all()
    assert (normal < 0.95 * wide).all()


def test_stack_split_and_repeat():
    weights = weights_of(Autoregressive(), 3)
    again = split(repeat(weights, 2), 2)
    assert all(torch.equal(part[name], weights[name]) for part in again for name in weights)
    joined = stack(split(weights, 3))
    assert all(torch.equal(joined[name], weights[name]) for name in weights)


def test_random_control_keeps_every_replicas_distance():
    base, tuned = weights_of(Autoregressive(), 2, seed=0), weights_of(Autoregressive(), 2, seed=1)
    tuned = reverse_merge(base, tuned, -0.01)
    control = random_control(base, tuned, seed=3)
    for name in base:
        for replica in range(2):
            want, step = tuned[name][replica] - base[name][replica], control[name][replica] - base[name][replica]
            assert step.norm().item() == pytest.approx(want.norm().item(), rel=1e-3)
    step = torch.cat([(control[name] - base[name]).flatten() for name in base])
    want = torch.cat([(tuned[name] - base[name]).flatten() for name in base])
    assert abs(torch.nn.functional.cosine_similarity(step, want, dim=0).item()) < 0.05


def test_sweep_and_plane_agree_with_the_models_they_pass():
    model, noise = Autoregressive(), evaluation_noise(500, seed=1)
    base, synth, other = (weights_of(model, 2, seed=seed) for seed in range(3))
    curve = sweep(model, base, synth, torch.tensor([-1.0, 0.0, 0.5]), noise)
    torch.testing.assert_close(curve.values[0], score(model, synth, noise))
    torch.testing.assert_close(curve.values[1], score(model, base, noise))
    by_hand = {name: 1.5 * base[name] - 0.5 * synth[name] for name in base}
    torch.testing.assert_close(curve.values[2], score(model, by_hand, noise), rtol=1e-4, atol=1e-6)
    values = plane(model, base, synth, other, torch.tensor([-1.0, 0.0, 0.5]), torch.tensor([0.0, 1.0]), noise)
    torch.testing.assert_close(values[0], curve.mean, rtol=1e-4, atol=1e-6)
    assert values[1, 1].item() == pytest.approx(score(model, other, noise).mean().item(), rel=1e-4)


def test_w_grid_has_the_base_and_the_self_trained_model():
    ws = w_grid(2.5)
    assert len(ws) == 21
    assert {-2.5, -1.0, 0.0, 2.5} <= set(ws.tolist())
    torch.testing.assert_close(ws, torch.linspace(-2.5, 2.5, 21))


def test_parabola_finds_the_vertex_of_each_replica():
    ws = torch.linspace(-2, 2, 21)
    values = torch.stack([3 * (ws - 0.37) ** 2 + 0.1, (ws + 1.13) ** 2 + 0.2], dim=1).double()
    curve = Curve(ws, values, num_points=100)
    torch.testing.assert_close(curve.best_w(), torch.tensor([0.37, -1.13]), rtol=1e-4, atol=1e-4)
    assert curve.parabola(values[:, 0]) == pytest.approx((3, -2.22, 3 * 0.37**2 + 0.1), abs=1e-4)
    with pytest.raises(ValueError, match="widen"):
        curve.parabola(ws.double())


def test_gradients_of_a_too_narrow_model():
    """Real points ask it to widen, samples of temperature 0.5 to narrow, of temperature 3 to widen: cosine < 0, > 0."""
    base = constant_model(mean=0.0, log_std=-0.5)
    result = alignment(Autoregressive(ordinary=1.0), base, [0.5, 3.0], num_points=4000, seed=0)
    for narrow, wide in (result.loss[:, 0], result.score[:, 0]):
        assert narrow < -0.9
        assert wide > 0.9


def test_score_gradient_in_closed_form():
    """Independent conditionals of one std s: FD = tr T + 2 s^2 - 2 s tr sqrt(T) with sqrt(T) of eigenvalues sqrt(3), 1;
    and s is exp(log_std) for both coordinates."""
    model, base, std = Autoregressive(ordinary=1.0), constant_model(mean=0.0, log_std=-0.5), math.exp(-0.5)
    noise = points_with(torch.eye(2, dtype=torch.float64), torch.zeros(2)).float()
    got = score_gradient(model, base, noise)["2.bias"][0, 0]
    want = 4 * std**2 - 2 * std * (math.sqrt(3) + 1)
    torch.testing.assert_close(got, torch.tensor([0.0, want]), rtol=1e-4, atol=1e-4)


def test_gradient_and_metric_in_closed_form():
    """d(-log p)/d(log_std) summed over both conditionals is 2 - E[x1^2 + x2^2] / std^2; nothing else moves with zero
    weights but the mean."""
    base, std = constant_model(mean=0.0, log_std=-0.5), math.exp(-0.5)
    x = points_with(COVARIANCE, torch.zeros(2, dtype=torch.float64)).float()
    grad = gradient(Autoregressive(), base, x, seed=0)["2.bias"][0, 0]
    want = 2 - x.square().sum(-1).mean() / std**2
    torch.testing.assert_close(grad, torch.stack([torch.tensor(0.0), want]), rtol=1e-4, atol=1e-4)
    metric = {"p": torch.tensor([[2.0, 3.0], [1.0, 1.0]])}
    a, b = {"p": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}, {"p": torch.tensor([[5.0, -1.0], [7.0, 4.0]])}
    assert inner(metric, a, b).tolist() == [2 * 5 - 3 * 2, 4]


@pytest.mark.parametrize("problem", [WarmUp(), WarmUp(dimension=3, num_points=20), WarmUp(dimension=1, num_points=30)])
def test_warm_up_moments_against_monte_carlo(problem):
    mean, covariance = problem.fits(20_000, seed=0)
    inverse = torch.linalg.inv(covariance)
    eye = torch.eye(problem.dimension, dtype=torch.float64)
    per_fit = torch.einsum("fij,fji->f", inverse, inverse) / problem.dimension
    assert problem.sandwich() == pytest.approx(per_fit.mean().item(), abs=5 * per_fit.std().item() / math.sqrt(20_000))
    truth = eye + mean[:, :, None] * mean[:, None]
    slopes = 0.5 * torch.einsum("fij,fjk,fki->f", inverse, inverse, eye - inverse @ truth)
    assert problem.slope() == pytest.approx(slopes.mean().item(), abs=5 * slopes.std().item() / math.sqrt(20_000))
    assert (problem.published_sandwich() == pytest.approx(problem.sandwich(), rel=1e-9)) == (problem.dimension == 1)


def test_warm_up_excess_is_the_kl_divergence():
    problem = WarmUp(dimension=3, num_points=20)
    mean, covariance = problem.fits(2, seed=1)
    excess = problem.excess_nll(mean, covariance, torch.tensor([0.0, 0.2], dtype=torch.float64))
    truth = torch.distributions.MultivariateNormal(
        torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    )
    for row, a in enumerate((0.0, 0.2)):
        model = torch.distributions.MultivariateNormal(mean, covariance + a * torch.linalg.inv(covariance))
        torch.testing.assert_close(excess[row], torch.distributions.kl_divergence(truth, model))


def test_warm_up_refuses_too_few_points():
    with pytest.raises(ValueError, match="num_points"):
        WarmUp(dimension=10, num_points=16)
