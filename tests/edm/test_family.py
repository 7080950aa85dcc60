"""What the family promises beyond the published numbers: invariances, closed forms, messages."""

import math

import pytest
import torch
import torch.nn.functional as F

from edm import augment
from edm.family import EDM
from edm.guidance import NegativeGuidance
from edm.layers import GroupNorm
from edm.options import Objective, Sampling
from edm.precond import PRECONDITIONERS, one_hot
from edm.warp import rotate2d, translate2d, warp
from neon.checkpoints import checkpoint
from neon.seeds import ImageRng, SharedRng
from tests import goldens

ARCH = {
    "class_name": "EDMPrecond",
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 5,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "augment_dim": 9,
    "dropout": 0.0,
}


def network(**changes):
    return goldens.seed_by_name(EDM().build({**ARCH, **changes})).eval()


def test_images_do_not_depend_on_their_batch():
    net, how = network(), Sampling(num_steps=3, S_churn=1.0)
    together, labels = EDM().sample(net, ImageRng([7, 8, 9, 10]), None, how)
    for seeds, part in (([9, 10], [2, 3]), ([8], [1])):
        alone, own = EDM().sample(net, ImageRng(seeds), None, how)
        assert torch.equal(own, labels[part])
        goldens.assert_close(alone, together[part], atol=1e-4)


def test_given_labels_leave_the_noise_alone():
    """With the labels that it would have drawn anyway, an image is the same."""
    net, how = network(), Sampling(num_steps=3, S_churn=1.0)
    drawn, labels = EDM().sample(net, ImageRng([1, 2]), None, how)
    given, used = EDM().sample(net, ImageRng([1, 2]), labels, how)
    assert torch.equal(drawn, given)
    assert torch.equal(used, labels)
    other, _ = EDM().sample(net, ImageRng([1, 2]), (labels + 1) % 5, how)
    assert not torch.allclose(other, drawn, atol=1e-3)


def test_an_unconditional_network_has_no_labels():
    codes, labels = EDM().sample(network(label_dim=0), ImageRng([0]), None, Sampling(num_steps=2))
    assert labels is None
    assert codes.shape == (1, 3, 8, 8)


def test_folded_pixels():
    """pixel_unshuffle is the same network on folded images, unfolded again: nothing is lost or reordered."""
    folded = network(img_resolution=8, img_channels=1, pixel_unshuffle=2)
    plain = network(img_resolution=4, img_channels=4)
    assert goldens.manifest_of(folded) == goldens.manifest_of(plain)
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 5.0]), one_hot(torch.tensor([0, 4]), 5)
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), sigma, labels), 2)
    goldens.assert_close(folded(x, sigma, labels), expected, atol=1e-6)


def test_an_image_without_noise_stays():
    """c_skip -> 1 and c_out -> 0 as sigma -> 0."""
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    goldens.assert_close(network()(x, torch.tensor(1e-5)), x, atol=1e-3)


def test_one_noise_level_for_the_batch_is_the_same_as_one_each():
    net, x = network(), torch.randn(3, 3, 8, 8)
    goldens.assert_close(net(x, torch.tensor(2.0)), net(x, torch.full([3], 2.0)), atol=1e-5)


def step(net, how, num_images=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (num_images, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(num_images) % 5
    return codes, labels, EDM().draw(SharedRng(num_images, generator), codes, labels, how)


@pytest.mark.parametrize("how", [Objective(), Objective(label_drop=0.5), Objective(kind="vp"), Objective(kind="ve")])
@torch.no_grad()
def test_a_batch_may_be_split(how):
    net = network()
    codes, labels, draws = step(net, how)
    whole = EDM().loss(net, codes, labels, draws, how)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    split = [
        EDM().loss(net, codes[part], labels[part], {name: value[part] for name, value in draws.items()}, how)
        for part in parts
    ]
    goldens.assert_close(torch.cat(split), whole, atol=0, rtol=1e-4)


@torch.no_grad()
def test_label_drop_is_the_null_class():
    net = network()
    codes, labels, draws = step(net, Objective())
    dropped = EDM().loss(net, codes, labels, draws, Objective(label_drop=1.0))
    kept = EDM().loss(net, codes, labels, draws, Objective(label_drop=0.0))
    some = EDM().loss(
        net, codes, labels, {**draws, "label_drop": torch.tensor([[0.1], [0.9]] * 3)}, Objective(label_drop=0.5)
    )
    net.model.map_label.weight.zero_()  # now every class is the null class
    goldens.assert_close(EDM().loss(net, codes, labels, draws, Objective(label_drop=0.0)), dropped, atol=0, rtol=1e-5)
    assert not torch.allclose(kept, dropped)
    goldens.assert_close(some[::2], dropped[::2], atol=0, rtol=1e-5)
    goldens.assert_close(some[1::2], kept[1::2], atol=0, rtol=1e-5)


@torch.no_grad()
def test_the_network_s_own_label_dropout_is_the_default():
    net = network(label_dropout=1.0)
    codes, labels, draws = step(net, Objective())
    own, none = (EDM().loss(net, codes, labels, draws, Objective(label_drop=drop)) for drop in (None, 0.0))
    assert not torch.allclose(own, none)
    goldens.assert_close(own, EDM().loss(net, codes, labels, draws, Objective(label_drop=1.0)), atol=0)


@torch.no_grad()
def test_stored_codes_are_pixels():
    """Images kept as the sampler made them train like the same values in uint8."""
    net, how = network(), Objective()
    codes, labels, draws = step(net, how)
    as_floats = codes.double() / 127.5 - 1
    goldens.assert_close(
        EDM().loss(net, as_floats, labels, draws, how), EDM().loss(net, codes, labels, draws, how), atol=0, rtol=1e-5
    )


def test_expected_loss_of_a_network_that_says_nothing():
    """F = 0: D = c_skip x, so the loss of white images of variance sigma_data^2 is (sigma^2 s^4 + sigma^4 s^2) /
    (...)^2 per pixel = 1."""
    net, how = network(augment_dim=0), Objective(sigma_data=0.5)
    for parameter in net.model.dec["8x8_aux_conv"].parameters():
        parameter.data.zero_()
    generator = torch.Generator().manual_seed(0)
    codes = 0.5 * torch.randn(4000, 3, 8, 8, generator=generator)
    draws = EDM().draw(SharedRng(4000, generator), codes, torch.zeros(4000, dtype=torch.long), how)
    with torch.no_grad():
        losses = EDM().loss(net, codes, torch.zeros(4000, dtype=torch.long), draws, how)
    assert losses.mean().item() / (3 * 64) == pytest.approx(1, rel=0.01)


def test_augmentation_needs_its_labels():
    net, how = network(augment_dim=0), Objective(augment=0.1)
    codes, labels, draws = step(net, how)
    with pytest.raises(ValueError, match="augment_dim 9"):
        EDM().loss(net, codes, labels, draws, how)


def test_mirroring_is_a_fair_coin_and_its_label_says_so():
    images = torch.rand(400, 3, 4, 4)
    pipe = augment.Pipe(p=0.15, xflip=1e8)
    out, labels = augment.augment(pipe, images, augment.draw(pipe, SharedRng(400, torch.Generator().manual_seed(0))))
    assert 150 < labels.sum() < 250
    expected = torch.where(labels[:, :, None, None] == 1, images.flip(3), images)
    assert torch.equal(out, expected)


def smooth_image(size, dx=0.0, dy=0.0):
    """A blob well inside the image, displaced by (dx, dy) pixels."""
    x = torch.arange(size) - (size - 1) / 2
    return torch.exp(-((x[None, :] - dx - 3) ** 2 + 2 * (x[:, None] - dy - 1) ** 2) / 18)[None, None]


@pytest.mark.parametrize(("dx", "dy"), [(0.0, 0.0), (3.0, 0.0), (0.0, -2.0), (1.3, -0.6)])
def test_warp_shifts_by_what_it_is_told(dx, dy):
    """inverse maps output to input positions: an inverse shift of -d moves the picture by +d."""
    moved = warp(smooth_image(32), translate2d(torch.tensor([-dx]), torch.tensor([-dy])))
    goldens.assert_close(moved, smooth_image(32, dx, dy), atol=0.01)


def test_warp_rotates():
    moved = warp(smooth_image(33), rotate2d(torch.tensor([math.pi / 2])))
    goldens.assert_close(moved, torch.rot90(smooth_image(33), 1, (2, 3)), atol=0.03)  # sym6 is not quite symmetric


def test_norm_groups():
    """min(32, C / 4) where that divides C, as published; else the next smaller divisor instead of a failure."""
    assert [GroupNorm(channels, 1e-6).num_groups for channels in (3, 8, 48, 128, 192, 256, 144)] == [
        1,
        2,
        12,
        32,
        32,
        32,
        24,
    ]


@torch.no_grad()
def test_guidance():
    net, guide = network(), network()
    for parameter in guide.parameters():
        parameter.mul_(0.9)
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor(0.7), one_hot(torch.tensor([1, 2]), 5)
    d, d_guide = net(x, sigma, labels), guide(x, sigma, labels)
    for g in (0, -1, 0.5, 2):
        guided = NegativeGuidance(net, guide, g)
        goldens.assert_close(guided(x, sigma, labels), d + g * (d - d_guide), atol=1e-5)
    with pytest.raises(ValueError, match="label_dim"):
        NegativeGuidance(net, network(label_dim=0), 1.0)


def test_noise_is_embedded_in_full_precision_under_autocast():
    net = network()
    seen = []
    net.model.map_layer1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = net(torch.randn(1, 3, 8, 8), torch.tensor(1.0))
    assert seen == [torch.float32]
    assert out.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_name": "SongUNet"}, "EDMPrecond"),
        ({"model_type": "UNet"}, "SongUNet"),
        ({"embeding_type": "fourier"}, "embeding_type"),
        ({"embedding_type": "sinus"}, "embedding_type"),
        ({"channel_mult": [1, 1, 1, 1, 1]}, "halved"),
        ({"pixel_unshuffle": 3}, "pixel_unshuffle"),
        ({"img_resolution": None}, "img_resolution"),
    ],
)
def test_a_network_that_cannot_be_built(change, message):
    arch = {key: value for key, value in {**ARCH, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        EDM().build(arch)


@pytest.mark.parametrize("class_name", PRECONDITIONERS)
@torch.no_grad()
def test_a_file_gives_back_the_network(tmp_path, class_name):
    """Loading builds on the meta device: what is computed in the constructor must come out the same."""
    arch = {
        **ARCH,
        "class_name": class_name,
        "model_type": "SongUNet",
        "embedding_type": "fourier",
        "resample_filter": [1, 3, 3, 1],
    }
    net = EDM().build(arch).eval()
    checkpoint.write(
        tmp_path / "net.safetensors", net.state_dict(), metadata={"family": "edm", "arch": arch, "weights": "ema"}
    )
    loaded = EDM().load(checkpoint.read(tmp_path / "net.safetensors")).eval()
    assert (loaded.sigma_min, loaded.sigma_max) == (net.sigma_min, net.sigma_max)
    codes, _ = EDM().sample(net, ImageRng([0, 1]), None, Sampling(num_steps=2))
    again, _ = EDM().sample(loaded, ImageRng([0, 1]), None, Sampling(num_steps=2))
    assert torch.equal(again, codes)


@pytest.mark.parametrize(
    "change", [{"num_steps": 1}, {"sigma_min": 90.0}, {"rho": 0.0}, {"S_churn": -1.0}, {"state": "float16"}]
)
def test_impossible_sampling(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Sampling(**change)


@pytest.mark.parametrize("change", [{"kind": "ddpm"}, {"augment": 1.5}, {"label_drop": -0.1}])
def test_impossible_objective(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Objective(**change)


def test_labels_out_of_range():
    with pytest.raises(ValueError, match=r"0 \.\. 4"):
        one_hot(torch.tensor([0, 5]), 5)
    with pytest.raises(ValueError, match="no labels"):
        one_hot(None, 5)


@torch.no_grad()
def test_activations_of_half_precision_keep_parameters_and_embedding_in_float32():
    """What use_fp16 does on a GPU: only the image path is float16."""
    net = network()
    x, noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.1, -0.3]), one_hot(torch.tensor([1, 2]), 5)
    out = net.model(x.half(), noise, labels)
    assert out.dtype == torch.float16
    goldens.assert_close(out.float(), net.model(x, noise, labels), atol=0.02)
    assert all(p.dtype == torch.float32 for p in net.parameters())
