"""Published sizes: the state dicts that we build have the published names, shapes and order."""

import pytest
import torch

from imm.family import IMM
from imm.presets import MODELS
from tests import goldens


def on_meta(arch):
    with torch.device("meta"):
        return IMM().build(arch)


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_equals_the_manifest(name):
    ours, published = goldens.manifest_of(on_meta(MODELS[name])), goldens.manifest("imm", name)
    assert ours == published
    assert list(ours) == list(published)


def test_the_base_has_as_many_parameters_as_published():
    assert sum(parameter.numel() for parameter in on_meta(MODELS["imm_imagenet256_ts_a2"]).parameters()) == 676_735_504


@pytest.mark.parametrize(
    ("size", "width", "depth", "heads"),
    [("XL", 1152, 28, 16), ("L", 1024, 24, 16), ("B", 768, 12, 12), ("S", 384, 12, 6)],
)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_sizes_of_the_transformer(size, width, depth, heads, patch):
    net = on_meta({**MODELS["imm_imagenet256_ts_a2"], "model_type": f"DiT_{size}_{patch}"}).model
    assert net.pos_embed.shape == (1, (32 // patch) ** 2, width)
    assert len(net.blocks) == depth
    assert net.blocks[0].attn.num_heads == heads


def test_a_misspelt_argument_is_an_error():
    with pytest.raises(ValueError, match="hiden_size"):
        on_meta({**MODELS["imm_imagenet256_ts_a2"], "hiden_size": 8})


def test_arguments_of_other_networks_are_left_out_as_stored_recipes_mix_them():
    mixed = {**MODELS["imm_cifar10"], "num_classes": 10, "share_tsemb": True, "mixed_precision": "fp16"}
    assert goldens.manifest_of(on_meta(mixed)) == goldens.manifest("imm", "imm_cifar10")


@pytest.mark.parametrize(
    "change",
    [{"f_type": "euler_fm", "noise_schedule": "vp_cosine"}, {"temb_type": "both"}, {"model_type": "DiT_XXL_2"}],
)
def test_choices_that_do_not_exist_are_errors(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        on_meta({**MODELS["imm_imagenet256_ts_a2"], **change})


def test_a_missing_argument_is_named():
    with pytest.raises(ValueError, match="img_resolution"):
        IMM().build({"img_channels": 3})
