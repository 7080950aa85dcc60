"""Heun's method against closed forms: Gaussian data, whose ideal denoiser and trajectories are known."""

import math

import pytest
import torch

from edm.sampler import Churn, noise_levels, sample_heun

MEAN, STD = 0.3, 0.5


def ideal(x, sigma):
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


def levels(num_steps, **changes):
    return noise_levels(num_steps, **{"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, **changes})


def test_second_order():
    """x_0 = m + (x_T - m) s / sqrt(s^2 + sigma_T^2): halving the step divides the error by about 4."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def error(num_steps):
        sigmas = levels(num_steps)
        exact = MEAN + (noise * sigmas[0] - MEAN) * STD / math.hypot(STD, sigmas[0])
        return (sample_heun(ideal, noise, sigmas) - exact).abs().max().item()

    assert 3.5 < error(32) / error(64) < 5
    assert error(256) < 1e-3


def test_levels():
    sigmas = levels(5, rho=3.0, sigma_min=1.0, sigma_max=27.0)
    assert sigmas.dtype == torch.float64
    assert sigmas.tolist() == pytest.approx([27, 2.5**3, 8, 1.5**3, 1])  # sigma^(1/3) = 3, 2.5, 2, 1.5, 1


@pytest.mark.parametrize("change", [{"sigma_min": 0.0}, {"sigma_min": 100.0}])
def test_impossible_levels(change):
    with pytest.raises(ValueError, match="sigma_min"):
        levels(5, **change)


def test_one_step_has_no_schedule():
    with pytest.raises(ValueError, match="num_steps"):
        levels(1)


def test_calls():
    """2 N - 1 calls, at the two ends of every step; the last step has one."""
    seen = []
    sample_heun(lambda x, sigma: seen.append(sigma.item()) or ideal(x, sigma), torch.zeros(1), levels(4))
    a, b, c, d = levels(4).tolist()
    assert seen == [a, b, b, c, c, d, d]


def stochastic(churn, num_images=20_000, num_steps=64):
    generator = torch.Generator().manual_seed(0)
    drawn = []

    def noise(level):
        drawn.append(level)
        return torch.randn(num_images, generator=generator, dtype=torch.float64)

    latents = torch.randn(num_images, generator=generator, dtype=torch.float64)
    return latents, sample_heun(ideal, latents, levels(num_steps), churn=churn, noise=noise), drawn


def test_churn_keeps_the_distribution_and_forgets_the_start():
    """Added noise is removed again: mean and spread stay the data's, while the image no longer follows from the
    latents."""
    latents, samples, drawn = stochastic(Churn(S_churn=64 * (math.sqrt(2) - 1)))
    assert len(drawn) == 64
    assert samples.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(len(samples)))
    assert samples.std().item() == pytest.approx(STD, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([latents, samples]))[0, 1]) < 0.05


def test_churn_adds_what_it_says():
    """One image at rest: after a step from sigma the added noise has variance sigma_hat^2 - sigma^2, times
    S_noise^2."""
    seen = []

    def watch(x, sigma):
        seen.append((x, sigma))
        return x  # no motion

    sigmas = levels(2, sigma_max=10.0, sigma_min=2.0)
    fresh = torch.ones(1, dtype=torch.float64)
    sample_heun(
        watch, torch.zeros(1), sigmas, churn=Churn(S_churn=0.5, S_noise=1.5, S_min=5.0), noise=lambda level: fresh
    )
    sigma_hat = 10 * 1.25
    assert seen[0][1].item() == pytest.approx(sigma_hat)
    assert seen[0][0].item() == pytest.approx(1.5 * math.sqrt(sigma_hat**2 - 100))
    assert seen[2][1].item() == pytest.approx(2.0)  # below S_min: not churned
    assert seen[2][0].item() == pytest.approx(seen[0][0].item())


def test_churn_needs_noise():
    with pytest.raises(ValueError, match="noise"):
        sample_heun(ideal, torch.zeros(1), levels(3), churn=Churn(S_churn=1))
