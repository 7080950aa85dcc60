"""Flow matching under the family protocol: draws, losses, pairings, checkpoints."""

import math

import pytest
import torch

from flow.coupling import exact_plan, sampled_pairs, sinkhorn_plan
from flow.family import Flow, to_pixels
from flow.loss import pairs, path
from flow.options import Objective, Sampling
from flow.presets import CIFAR10
from neon.checkpoints import checkpoint
from neon.seeds import SharedRng, image_rng
from tests import goldens
from tests.flow import published
from tests.flow.published import TINY

KINDS = [
    Objective(kind="icfm"),
    Objective(),
    Objective(pairing="sampled"),
    Objective(kind="fm"),
    Objective(kind="si", sigma=0.1),
]
KINDS += [
    Objective(kind="sb", sigma=0.5),
    Objective(kind="sb", sigma=3.0, pairing="sinkhorn"),
    Objective(flip=0.5, pairing="sampled"),
]


def model_of(arch):
    return goldens.seed_by_name(Flow().build(arch)).eval()


def pictures(batch, side=8):
    return torch.randint(256, (batch, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def drawn(codes, labels, how, seed=1):
    return Flow().draw(SharedRng(len(codes), torch.Generator().manual_seed(seed)), codes, labels, how)


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_the_velocity_is_the_derivative_of_the_path(how):
    """By differences in t, at the same noise; of the paths' own noise only the bridge's changes in time."""
    generator = torch.Generator().manual_seed(0)
    noise, images, path_noise = (torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    t, step = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), 1e-6
    extra = path_noise if how.has_path_noise else None
    (before, _), (_, u_t), (after, _) = (path(how, noise, images, t + d, extra) for d in (-step, 0, step))
    torch.testing.assert_close((after - before) / (2 * step), u_t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_the_path_goes_from_noise_to_the_image(how):
    generator = torch.Generator().manual_seed(0)
    noise, images = (torch.randn(1, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    extra = torch.zeros_like(noise) if how.has_path_noise else None
    start, _ = path(how, noise, images, torch.zeros(1, dtype=torch.float64), extra)
    torch.testing.assert_close(start, noise)
    end, _ = path(how, noise, images, torch.ones(1, dtype=torch.float64) - 1e-12, extra)
    torch.testing.assert_close(end, images, rtol=0, atol=1e-9)


def test_fm_ends_in_noise_of_standard_deviation_sigma_around_the_image():
    noise, images = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.5]])
    end, _ = path(Objective(kind="fm", sigma=0.25), noise, images, torch.ones(1), None)
    torch.testing.assert_close(end, images + 0.25 * noise)


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_slices_of_the_draws_give_slices_of_the_losses(how):
    """What makes ranks and accumulation rounds exact, also where the whole batch was paired."""
    family, model, codes = Flow(), model_of({**TINY, "class_cond": True, "num_classes": 3}), pictures(6)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    draws = drawn(codes, labels, how)
    assert all(len(value) == 6 for value in draws.values())
    whole = family.loss(model, codes, labels, draws, how)
    part = family.loss(model, codes[2:4], labels[2:4], {name: value[2:4] for name, value in draws.items()}, how)
    assert whole.shape == (6,)
    torch.testing.assert_close(part, whole[2:4], rtol=1e-4, atol=0)


def test_the_loss_of_an_untrained_network_is_the_mean_square_of_the_velocity():
    """Its output is exactly 0."""
    family, codes, how = Flow(), pictures(4), Objective(kind="icfm")
    draws = drawn(codes, None, how)
    expected = (codes / 127.5 - 1 - draws["noise"]).square().mean((1, 2, 3))
    torch.testing.assert_close(family.loss(family.build(TINY), codes, None, draws, how), expected)


def test_assigned_noise_is_the_nearest_permutation():
    """Images far apart, noise made of them: every image finds its own."""
    images = torch.arange(5.0)[:, None] * 10
    order = torch.tensor([3, 0, 4, 1, 2])
    i, j = pairs(Objective(), images[order] + 0.1, images, None)
    assert j.tolist() == [0, 1, 2, 3, 4]
    assert order[i].tolist() == j.tolist()


def test_pairing_shortens_the_way_and_loses_no_noise():
    codes = pictures(16)
    alone, paired = drawn(codes, None, Objective(kind="icfm"))["noise"], drawn(codes, None, Objective())["noise"]
    assert sorted(alone.sum((1, 2, 3)).tolist()) == sorted(paired.sum((1, 2, 3)).tolist())

    def length(noise):
        return (to_pixels(codes, None) - noise).square().sum().item()

    assert length(paired) < length(alone)


def test_sampled_pairs_take_their_labels_along_and_repeat_some():
    codes, labels = pictures(64), torch.arange(64)
    draws = drawn(codes, labels, Objective(pairing="sampled"))
    assert torch.equal(draws["images"], to_pixels(codes, None)[draws["labels"]])
    assert 0.5 < len(draws["labels"].unique()) / 64 < 0.75  # 1 - 1/e of them on average


@pytest.mark.parametrize("pairing", ["assigned", "sampled"])
def test_mirrored_images_are_paired_and_trained_as_they_are(pairing):
    codes, how = pictures(32), Objective(flip=0.5, pairing=pairing)
    plain = drawn(codes, None, Objective(flip=0.5, kind="icfm"))
    assert 4 < plain["flipped"].sum() < 28
    mirrored = torch.where(plain["flipped"][:, None, None, None], codes.flip(-1), codes).float() / 127.5 - 1
    torch.testing.assert_close(to_pixels(codes, plain["flipped"]), mirrored)
    draws = drawn(codes, torch.arange(32), how)
    if pairing == "sampled":
        torch.testing.assert_close(draws["images"], mirrored[draws["labels"]])
    else:
        i, _ = pairs(Objective(), plain["noise"], mirrored, None)
        assert torch.equal(draws["noise"], plain["noise"][i])
        assert torch.equal(draws["flipped"], plain["flipped"])


def test_codes_of_the_sampler_are_not_mirrored():
    codes = torch.zeros(4, 3, 8, 8)
    assert "flipped" not in drawn(codes, None, Objective(flip=0.5))


def test_transport_between_sets_of_two_sizes():
    """2 points on 3 (of a line): the left one goes to the left with 1/3 and halves the middle, by hand."""
    cost = (torch.tensor([0.0, 2.0])[:, None] - torch.tensor([0.0, 1.1, 2.0])) ** 2
    expected = torch.tensor([[1 / 3, 1 / 6, 0], [0, 1 / 6, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(exact_plan(cost), expected)


def test_sinkhorn_has_a_closed_form_for_two_points():
    """Cost c off the diagonal: equal weights e^(-c / reg) : 1, however small reg is."""
    for reg in (5.0, 0.5, 1e-3):
        off = math.exp(-2 / reg) / (1 + math.exp(-2 / reg)) / 2
        expected = torch.tensor([[0.5 - off, off], [off, 0.5 - off]], dtype=torch.float64)
        torch.testing.assert_close(
            sinkhorn_plan(torch.tensor([[0.0, 2.0], [2.0, 0.0]]), reg), expected, rtol=0, atol=1e-9
        )


def test_pairs_are_drawn_as_often_as_the_plan_says():
    plan = torch.tensor([[0.5, 0.0], [0.2, 0.3]], dtype=torch.float64)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    i, j = sampled_pairs(plan, uniform)
    counts = torch.bincount(2 * i + j, minlength=4) / len(i)
    torch.testing.assert_close(counts.double(), plan.flatten(), rtol=0, atol=0.01)
    assert counts[1] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "cfm"},
        {"sigma": -1.0},
        {"kind": "sb"},
        {"kind": "fm", "sigma": 1.0},
        {"pairing": "sinkhorn"},
        {"pairing": "x"},
        {"flip": 2},
    ],
)
def test_objectives_are_checked(wrong):
    with pytest.raises(ValueError, match=r"^(kind|sigma|pairing|flip)"):
        Objective(**wrong)


@pytest.mark.parametrize(("prefix", "change"), [("", {}), ("module.", {"class_cond": True, "num_classes": 4})])
def test_torchcfm_files_are_read(tmp_path, prefix, change):
    """Both weight sets, with and without DataParallel's prefix; the network is told from the shapes."""
    path = tmp_path / "otcfm_cifar10_weights_step_1.pt"
    arch = {**CIFAR10, "num_channels": 32, **change}
    net = published.write_checkpoint(path, arch, prefix)
    assert sorted(torch.load(path, weights_only=True)) == sorted(["net_model", "ema_model", "sched", "optim", "step"])
    family = Flow()
    found = checkpoint.read(path)
    assert found.family == "flow"
    assert family.arch_of(found) == arch
    loaded = family.load(found)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())
    raw = checkpoint.read(path, weights="raw").tensors
    moved = [(raw[name] - value).abs().max().item() for name, value in net.state_dict().items()]
    assert len(moved) == len(raw)
    assert max(moved) > 0


def test_another_network_must_say_how_it_is_built(tmp_path):
    path = tmp_path / "other.pt"
    published.write_checkpoint(path, TINY)
    with pytest.raises(ValueError, match="does not say how its network is built"):
        Flow().load(checkpoint.read(path))


def test_a_foreign_file_is_an_error(tmp_path):
    path = tmp_path / "foreign.pt"
    torch.save({"ema_model": {"time_embed.0.weight": torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match="does not say how its network is built"):
        Flow().load(checkpoint.read(path))


def test_written_weights_are_read_and_sample_the_same(tmp_path):
    family, model, path = Flow(), model_of(TINY), tmp_path / "ours.safetensors"
    checkpoint.write(path, model.state_dict(), metadata={"family": "flow", "arch": TINY, "weights": "ema"})
    again = family.load(checkpoint.read(path)).eval()
    before, after = (
        family.sample(net, image_rng(0, range(2), "cpu"), None, Sampling(tol=1e-3))[0] for net in (model, again)
    )
    assert torch.equal(before, after)


def test_labels_must_fit_the_network():
    conditional = model_of({**TINY, "class_cond": True, "num_classes": 3})
    with pytest.raises(ValueError, match="takes 3 classes"):
        Flow().loss(conditional, pictures(2), None, drawn(pictures(2), None, Objective()), Objective())
