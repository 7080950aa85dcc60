"""The solvers against closed forms and orders of convergence; images that do not depend on their batch."""

import math

import pytest
import torch

from flow.family import Flow
from flow.options import Sampling
from flow.sampler import dopri5, euler
from neon.quantize import DivergedError
from neon.seeds import image_rng
from tests import goldens
from tests.flow.published import TINY

MEAN, STD = 0.3, 0.5


def gaussian_velocity(t, x, labels=None):
    """The exact velocity of x_t = t x1 + (1 - t) x0 for data x1 ~ N(MEAN, STD^2)."""
    t = t.view(-1, *[1] * (x.ndim - 1))
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def gaussian_flow(x):
    """Where it takes noise: to the same quantile of the data."""
    return MEAN + STD * x


NOISE = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]


def test_euler_is_of_first_order():
    def error(num_steps):
        times = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        return (euler(gaussian_velocity, NOISE, None, times)[-1] - gaussian_flow(NOISE)).abs().max().item()

    assert 1.8 < error(64) / error(128) < 2.2


@pytest.mark.parametrize("error_norm", ["image", "batch"])
def test_dopri5_keeps_its_tolerance(error_norm):
    errors = {}
    for tol in (1e-4, 1e-6, 1e-8):
        found = dopri5(gaussian_velocity, NOISE, None, (0.0, 1.0), tol=tol, error_norm=error_norm)[-1]
        errors[tol] = (found - gaussian_flow(NOISE)).abs().max().item()
        assert errors[tol] < 10 * tol
    assert errors[1e-8] < errors[1e-4] / 1000


def test_a_step_is_of_fifth_order():
    """The local error falls with the sixth power of the step's length; that of the interpolant in its middle with the
    fifth."""
    from flow.sampler import MIDPOINT, combined, interpolated, stages

    def errors(length):
        t, h, y = (
            torch.zeros(1, dtype=torch.float64),
            torch.tensor([length], dtype=torch.float64),
            torch.tensor([[1.0]], dtype=torch.float64),
        )

        def field(t, y):
            return y * torch.cos(t)[:, None]

        slopes, end = stages(field, t, h, y, field(t, y))
        part = combined(slopes, MIDPOINT, h)
        inside = interpolated(torch.tensor([0.3], dtype=torch.float64), h, y, end, slopes[0], slopes[-1], part)
        return abs(end.item() - math.exp(math.sin(length))), abs(inside.item() - math.exp(math.sin(0.3 * length)))

    ends, insides = zip(errors(0.4), errors(0.2), strict=True)
    assert ends[0] / ends[1] > 2**5.5
    assert insides[0] / insides[1] > 2**4.5


def test_each_image_has_steps_of_its_own():
    """A velocity that is stiff for one label: the other image is not asked more often, and gets the same values as
    alone."""
    asked = []

    def velocity(t, x, labels):
        asked.append(labels.tolist())
        return -(1 + 60 * labels[:, None]) * (x - torch.cos(t)[:, None])

    x, labels = torch.tensor([[0.5], [0.5]], dtype=torch.float64), torch.tensor([0, 1])
    together = dopri5(velocity, x, labels, (0.0, 1.0), tol=1e-5)[-1]
    calls = [sum(label in call for call in asked) for label in (0, 1)]
    assert calls[0] < calls[1] / 2
    for i in range(2):
        asked.clear()
        alone = dopri5(velocity, x[i : i + 1], labels[i : i + 1], (0.0, 1.0), tol=1e-5)[-1]
        assert torch.equal(alone, together[i : i + 1])
        assert len(asked) == calls[i]
    coupled = dopri5(velocity, x, labels, (0.0, 1.0), tol=1e-5, error_norm="batch")[-1]
    assert not torch.equal(coupled[0], together[0])


@pytest.mark.parametrize("how", [Sampling(), Sampling(tol=1e-3), Sampling(solver="euler", num_steps=4)], ids=str)
def test_an_image_depends_on_its_seed_and_label_only(how):
    family, arch = Flow(), {**TINY, "class_cond": True, "num_classes": 3}
    model = goldens.seed_by_name(family.build(arch)).eval()
    labels = torch.tensor([0, 1, 2, 0])
    together, used = family.sample(model, image_rng(5, range(4), "cpu"), labels, how)
    alone, _ = family.sample(model, image_rng(5, [2], "cpu"), labels[2:3], how)
    assert used.tolist() == labels.tolist()
    torch.testing.assert_close(
        together[2:3], alone, rtol=0, atol=max(1e-4, how.tol) if how.solver == "dopri5" else 1e-5
    )
    assert (together[0] - together[3]).abs().max() > 0.1  # the same class, another seed
    other, _ = family.sample(model, image_rng(5, [2], "cpu"), torch.tensor([0]), how)
    assert (other - alone).abs().max() > 0.01


def test_labels_are_drawn_after_the_noise_if_none_are_given():
    family, arch = Flow(), {**TINY, "class_cond": True, "num_classes": 3}
    model, how = goldens.seed_by_name(family.build(arch)).eval(), Sampling(solver="euler", num_steps=1)
    images, labels = family.sample(model, image_rng(0, range(32), "cpu"), None, how)
    assert set(labels.tolist()) == {0, 1, 2}
    again, _ = family.sample(model, image_rng(0, range(32), "cpu"), labels, how)
    assert torch.equal(images, again)


def test_a_velocity_that_is_no_number_stops():
    """As images that are no numbers: of a search's point, on every rank, a line of the ledger."""
    with pytest.raises(DivergedError, match="not finite"):
        dopri5(lambda t, x, labels: x * math.nan, NOISE, None, (0.0, 1.0), tol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"solver": "rk4"}, "solver"),
        ({"solver": "euler"}, "num_steps"),
        ({"num_steps": 100}, "num_steps"),
        ({"tol": 0.0}, "tol"),
        ({"error_norm": "max"}, "error_norm"),
    ],
)
def test_options_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
