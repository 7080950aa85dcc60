"""The sampler against closed forms, and what it must not depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neon.seeds import ImageRng, SharedRng
from tests.xar.test_transformer import tiny
from xar import sampler

MEAN, STD = 0.3, 0.5


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[noise - data | x_t = x] for data ~ N(MEAN, STD^2) and x_t = (1 - t) data + t noise."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_euler_is_first_order_on_gaussian_data():
    """The probability flow maps a standard normal start z to MEAN + STD z."""
    start = normal(1, 64, 16)

    def error(num_steps: int) -> float:
        return float((sampler.integrate_ode(gaussian_velocity, start, num_steps) - (MEAN + STD * start)).abs().max())

    assert 1.8 < error(100) / error(200) < 2.2


def test_euler_maruyama_samples_gaussian_data():
    """Mean and deviation of 40,960 samples: the statistical error of both is about 0.002 to 0.0025."""
    num_steps, batch = 200, 40
    out = sampler.integrate_sde(gaussian_velocity, normal(batch, 64, 16), normal(num_steps - 1, batch, 64, 16, seed=1))
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(out.std()) == pytest.approx(STD, abs=0.01)


def test_noise_reaches_every_step_but_the_last():
    """With a known linear drift the noise of step k enters with weight sqrt(2 t_k dt_k) times the later steps'
    factors."""
    num_steps = 5
    times = sampler.time_grid(num_steps, "sde")
    noise = torch.zeros(num_steps - 1, 1, 64, 16, dtype=torch.float64)
    zero = sampler.integrate_sde(lambda x, t: torch.zeros_like(x), noise[0], noise)
    assert (zero == 0).all()
    for k in range(num_steps - 1):
        kicked = noise.clone()
        kicked[k] = 1
        weight = (2 * times[k] * (times[k] - times[k + 1])).sqrt()
        for later in range(k + 1, num_steps):  # zero velocity leaves the drift x
            weight = weight * (1 + times[later + 1] - times[later])
        out = sampler.integrate_sde(lambda x, t: torch.zeros_like(x), noise[0], kicked)
        torch.testing.assert_close(out, weight.expand_as(out), rtol=1e-12, atol=0)


def test_the_stochastic_sampler_needs_two_steps():
    with pytest.raises(ValueError, match="num_steps >= 2"):
        sampler.time_grid(1, "sde")


def test_images_do_not_depend_on_the_batch():
    model, labels = tiny(), torch.tensor([3, 1, 4])
    together = sampler.sample_cells(model, ImageRng([7, 8, 9]), labels, num_steps=3, cfg_scale=2.0)
    alone = [
        sampler.sample_cells(model, ImageRng([7 + i]), labels[i : i + 1], num_steps=3, cfg_scale=2.0) for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_an_image_draws_its_noise_in_blocks():
    """One start and one block of noise per cell and image, whatever the number of steps."""
    calls = []

    class Counting(ImageRng):
        def normal(self, shape, dtype=torch.float32) -> Tensor:
            calls.append(tuple(shape))
            return super().normal(shape, dtype)

    sampler.sample_cells(tiny(), Counting([5]), torch.tensor([2]), num_steps=6, cfg_scale=1.0)
    assert calls == [(64, 16), (5, 64, 16)] * 4


@pytest.mark.parametrize(("cfg_scale", "rows"), [(3.0, [2, 4, 4, 4]), (1.0, [2] * 4), (0.5, [2] * 4)])
def test_cost(cfg_scale, rows):
    """num_steps calls per cell and one per finished cell that is re-fed; the null half only where it counts."""
    model, seen = tiny(), []
    model.register_forward_pre_hook(
        lambda _m, args, kw: seen.append((kw["first_cell"], len(args[0]), int(args[1][0, 0]))), with_kwargs=True
    )
    sampler.sample_cells(
        model, SharedRng(2, torch.Generator().manual_seed(0)), torch.tensor([1, 2]), num_steps=3, cfg_scale=cfg_scale
    )
    expected = []
    for cell in range(4):
        if cell:
            expected.append((cell - 1, max(rows), 0))
        expected += [(cell, rows[cell], timestep) for timestep in (1000, 520, 40)]
    assert seen == expected


def test_guidance_below_one_is_no_guidance():
    model, labels = tiny(), torch.tensor([1, 2])
    unguided, below = (
        sampler.sample_cells(model, ImageRng([0, 1]), labels, num_steps=3, cfg_scale=s) for s in (1.0, 0.2)
    )
    assert torch.equal(unguided, below)


def test_guidance_extrapolates_from_the_null_label():
    """A model whose label does not matter is not changed by guidance; one whose label does is."""
    model, labels = tiny(), torch.tensor([1, 2])

    def sample(cfg_scale: float) -> Tensor:
        return sampler.sample_cells(model, ImageRng([0, 1]), labels, num_steps=3, cfg_scale=cfg_scale)

    difference = (sample(4.0) - sample(1.0)).abs().amax(dim=(0, 1))
    assert difference[:8, :8].max() < 1e-6 < difference[:8, 8:].max()  # the first cell is never guided
    model.class_emb.weight.data[:] = model.class_emb.weight.data[0].clone()
    torch.testing.assert_close(sample(4.0), sample(1.0), rtol=0, atol=1e-4)
