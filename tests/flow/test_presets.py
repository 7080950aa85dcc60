"""Published sizes: the state dicts that we build have the published names, shapes and order."""

import pytest
import torch

from flow.family import Flow
from flow.presets import CIFAR10, MODELS
from flow.unet import UNet
from tests import goldens

MANIFESTS = sorted(
    file.stem for file in (goldens.MANIFESTS / "flow").glob("*.json") if file.stem != "checkpoint_layout"
)


def on_meta(arch):
    with torch.device("meta"):
        return Flow().build(arch)


@pytest.mark.parametrize("name", MANIFESTS)
def test_state_dict_equals_the_manifest(name):
    ours, published = goldens.manifest_of(on_meta(MODELS[name])), goldens.manifest("flow", name)
    assert ours == published
    assert list(ours) == list(published)


def test_the_published_network_has_as_many_parameters_as_stated():
    assert sum(parameter.numel() for parameter in on_meta(CIFAR10).parameters()) == 35_746_307


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_chanels": 8}, "num_chanels"),
        ({"num_channels": 48}, "multiples of 32"),
        ({"dim": [3, 28, 28]}, "halve the image 3 times"),
        ({"dim": [3, 32]}, "channels, height, width"),
        ({"channel_mult": None, "dim": [3, 48, 48]}, "channel_mult"),
        ({"num_head_channels": 96}, "heads"),
        ({"num_head_channels": -1, "num_heads": 3}, "heads"),
        ({"pixel_unshuffle": 3}, "pixel_unshuffle"),
        ({"learn_sigma": True}, "learn_sigma"),
    ],
)
def test_arguments_that_make_no_network_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        on_meta({**CIFAR10, **change})


def test_a_missing_argument_is_named():
    with pytest.raises(ValueError, match="num_channels"):
        Flow().build({"dim": [3, 32, 32]})


@torch.no_grad()
def test_unshuffled_pixels_are_the_channels_of_a_smaller_network():
    """pixel_unshuffle changes nothing but the layout: the same weights on folded images."""
    arch = {"num_channels": 64, "num_res_blocks": 1, "channel_mult": [1, 1], "attention_resolutions": "4"}
    whole = goldens.seed_by_name(UNet(dim=[1, 16, 16], pixel_unshuffle=2, **arch))
    folded = UNet(dim=[4, 8, 8], **arch)
    folded.load_state_dict(whole.state_dict())
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.7])
    expected = folded(t, torch.nn.functional.pixel_unshuffle(x, 2))
    torch.testing.assert_close(torch.nn.functional.pixel_unshuffle(whole(t, x), 2), expected, rtol=0, atol=1e-6)
