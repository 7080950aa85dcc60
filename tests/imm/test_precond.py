"""The map f(x, t, s): closed forms on Gaussian data, composition, guidance."""

import math

import pytest
import torch

from imm.precond import IMMPrecond
from imm.sampler import edm_grid, explicit_grid, pushforward, restart, uniform_grid
from imm.schedule import SCHEDULES
from neon.seeds import ImageRng


def tiny(model_type="DiT", **arguments):
    sizes = {
        "DiT": {"hidden_size": 8, "depth": 1, "num_heads": 2, "num_classes": 3},
        "DhariwalUNet": {"channel_mult": [1], "num_blocks": 1},
    }
    sizes["SongUNet"] = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    torch.manual_seed(0)
    return IMMPrecond(
        img_resolution=4, img_channels=2, label_dim=3, model_type=model_type, **{**sizes[model_type], **arguments}
    ).eval()


class GaussianData(torch.nn.Module):
    """The network output that makes f exact for data N(0, sd^2 I), whose flow keeps x / |std of x_t|."""

    def __init__(self, net, data_std):
        super().__init__()
        self.net, self.data_std = net, data_std

    def std(self, t):
        return torch.sqrt(
            (self.net.schedule.alpha(t) * self.data_std) ** 2 + (self.net.schedule.sigma(t) * self.net.sigma_data) ** 2
        )

    def exact(self, x, t, s):
        return x * self.std(s) / self.std(t)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nt_and_t_are_inverse_and_alpha_is_decreasing(schedule):
    s = SCHEDULES[schedule]
    t = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(s.t_of_nt(s.log_nt(t).exp()), t, rtol=1e-12, atol=0)
    torch.testing.assert_close(s.log_nt(t).exp(), s.sigma(t) / s.alpha(t), rtol=1e-12, atol=0)
    slope = (s.logsnr(t + 1e-6) - s.logsnr(t - 1e-6)) / 2e-6
    torch.testing.assert_close(s.logsnr_slope(t), slope, rtol=1e-4, atol=0)
    assert (s.alpha(t).diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_moves_along_the_line_through_data_and_noise(schedule):
    s = SCHEDULES[schedule]
    clean, noise = torch.randn(2, 5, dtype=torch.float64)
    t, earlier = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(
        s.ddim(s.add_noise(clean, noise, t), clean, t, earlier), s.add_noise(clean, noise, earlier)
    )


@pytest.mark.parametrize(
    ("f_type", "schedule"), [("euler_fm", "fm"), ("simple_edm", "fm"), ("simple_edm", "vp_cosine"), ("identity", "fm")]
)
def test_the_output_map_inverts_for_the_true_velocity(f_type, schedule):
    """If F is what the point pair (clean, noise) implies, every map sends x_t to x_s."""
    net = tiny(f_type=f_type, noise_schedule=schedule)
    clean, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    t, s = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    alpha, sigma = net.schedule.alpha, net.schedule.sigma
    x_t, x_s = (net.schedule.add_noise(clean, noise, time) for time in (t, s))
    if f_type == "identity":
        F = clean
    elif f_type == "euler_fm":
        F = (noise - clean) / net.sigma_data
    else:  # the direction orthogonal to x_t in the plane of data and noise
        F = (alpha(t) * noise - sigma(t) * clean) / torch.sqrt(alpha(t) ** 2 + sigma(t) ** 2) / net.sigma_data
    torch.testing.assert_close(net.output(x_t, F, t, s), x_s)


@pytest.mark.parametrize("f_type", ["euler_fm", "simple_edm"])
@torch.no_grad()
def test_f_is_the_identity_at_s_equal_t(f_type):
    net, x = tiny(f_type=f_type), torch.randn(2, 2, 4, 4)
    t = torch.tensor(0.6)
    torch.testing.assert_close(net(x, t, t, torch.eye(3)[:2]), x)


@torch.no_grad()
def test_guidance_extrapolates_the_network_output():
    """With f affine in F, f at scale c is f_0 + c (f_1 - f_0), where f_0 has no class."""
    net = perturbed(tiny())
    x, labels = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.eye(3)
    t, s = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    none, full = net(x, t, s, torch.zeros(3, 3)), net(x, t, s, labels)
    assert (none - full).abs().max() > 1e-3
    torch.testing.assert_close(net.guided(x, t, s, labels, 2.5), none + 2.5 * (full - none), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.guided(x, t, s, labels, 1.0), full, rtol=0, atol=0)


def perturbed(net):
    """Fresh transformers output zero: give every weight some value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def test_guidance_needs_classes():
    net = IMMPrecond(4, 2, 0, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1)
    t = torch.tensor(0.5)
    with pytest.raises(ValueError, match="class-conditional"):
        net.guided(torch.zeros(1, 2, 4, 4), t, t, None, 1.5)


@torch.no_grad()
def test_stride_sees_the_difference_of_the_times():
    """Only temb_type tells the two published ImageNet models apart: their tensors have the same names and shapes."""
    stride, identity = perturbed(tiny(temb_type="stride")), perturbed(tiny(temb_type="identity"))
    x, labels = torch.randn(1, 2, 4, 4), torch.eye(3)[:1]
    t, s = torch.tensor(0.9), torch.tensor(0.25)
    torch.testing.assert_close(stride.network(x, t, s, labels), identity.network(x, t, t - s, labels))
    assert (stride.network(x, t, s, labels) - identity.network(x, t, s, labels)).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["DiT", "SongUNet", "DhariwalUNet"])
@torch.no_grad()
def test_networks_see_every_input(model_type):
    net = perturbed(tiny(model_type))
    x, labels = torch.randn(2, 2, 4, 4), torch.eye(3)[:2]
    t, s = torch.tensor(0.9), torch.tensor(0.25)
    reference = net.network(x, t, s, labels)
    for changed in (
        net.network(x, t + 0.05, s, labels),
        net.network(x, t, s + 0.05, labels),
        net.network(x, t, s, torch.zeros(2, 3)),
    ):
        assert (changed - reference).abs().max() > 1e-3
    per_image = net.network(x, t.expand(2), s.expand(2), labels)
    torch.testing.assert_close(per_image, reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.network(x[1:], t, s, labels[1:]), reference[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["DiT", "SongUNet", "DhariwalUNet"])
@torch.no_grad()
def test_without_the_second_embedding_the_network_does_not_see_s(model_type):
    net = perturbed(tiny(model_type, s_embed=False))
    assert not [name for name in net.state_dict() if "_s." in name or "s_embedder" in name]
    x, labels, t = torch.randn(1, 2, 4, 4), torch.eye(3)[:1], torch.tensor(0.9)
    assert torch.equal(net.network(x, t, torch.tensor(0.1), labels), net.network(x, t, torch.tensor(0.8), labels))


@pytest.mark.parametrize("grid", ["uniform", "edm", "explicit"])
def test_pushforward_through_exact_maps_is_exact_on_gaussian_data(grid):
    """f composes: with the true f the end does not depend on the times in between."""
    net = tiny(T=0.99, eps=0.01)
    exact = GaussianData(net, data_std=0.2)
    net.guided = lambda x, t, s, labels, cfg_scale: exact.exact(x, t, s)
    times = {"uniform": uniform_grid(net, 5, torch.float64), "edm": edm_grid(net, 5, torch.float64)}
    times["explicit"] = explicit_grid(net, [7.0, 1.0], torch.float64)
    assert times[grid][0].item() == pytest.approx(0.99, rel=1e-9)
    assert times[grid][-1].item() == pytest.approx(0.01, rel=1e-9)
    noise = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    expected = exact.exact(noise, *times[grid][[0, -1]])
    torch.testing.assert_close(pushforward(net, noise, times[grid], None, cfg_scale=1.0), expected)


def test_restart_keeps_the_distribution_of_gaussian_data():
    net = tiny(eps=0.001)
    exact = GaussianData(net, data_std=0.2)
    net.guided = lambda x, t, s, labels, cfg_scale: exact.exact(x, t, s)
    noise = torch.randn(64, 2, 32, 32, generator=torch.Generator().manual_seed(1)) * net.sigma_data
    images = restart(net, noise, uniform_grid(net, 4, torch.float64), None, ImageRng(range(64)), cfg_scale=1.0)
    assert images.std().item() == pytest.approx(
        exact.std(torch.tensor(0.001)).item(), rel=0.02
    )  # 131,072 numbers: 0.2 %
    assert (images / images.std()).flatten().dot(
        (noise / noise.std()).double().flatten()
    ).abs() / images.numel() < 0.25  # fresh noise


def test_explicit_levels_are_where_they_say():
    net = tiny()
    grid = explicit_grid(net, [3.0, 0.25], torch.float64)
    torch.testing.assert_close(grid, torch.tensor([0.994, 0.75, 0.2, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="must decrease"):
        explicit_grid(net, [0.25, 3.0], torch.float64)
    assert math.isclose(uniform_grid(net, 4, torch.float64)[1].item(), 0.994 * 3 / 4)


def test_the_edm_grid_needs_a_noise_level_at_t():
    """At T = 1 it would be 1, 1, 1 ...: images of noise."""
    with pytest.raises(
        ValueError, match=r"infinite at T = 1: its times would be \[1\.0, 1\.0, 1\.0\]; take grid = 'uniform'"
    ):
        edm_grid(tiny(T=1.0), 2, torch.float64)
