"""Checkpoints: manifests of the published files, sizes told from shapes, wrappers, damaged or foreign files."""

import pytest
import torch

from neon.checkpoints import checkpoint
from tests import goldens
from var.derived import attention_mask
from var.family import FAMILY
from var.load import read_tokeniser, tokeniser_arch_of, transformer_arch_of
from var.presets import IMAGE_SIDE, PATCH_NUMS, published
from var.transformer import Transformer, VARArch
from var.vqvae import VQVAE, VQVAEArch

TINY = VARArch(
    depth=2, embed_dim=16, heads=2, patch_nums=(1, 2, 3), num_classes=3, vocabulary=11, code_width=5, drop_path=0.1 / 12
)


def meta_state(manifest):
    return {
        name: torch.empty(entry[:-1], dtype=getattr(torch, entry[-1]), device="meta")
        for name, entry in manifest.items()
    }


@pytest.mark.parametrize("name", IMAGE_SIDE)
def test_published_transformers_have_the_published_state_dict(name):
    with torch.device("meta"):
        model = Transformer(published(name))
    ours = goldens.manifest_of(model)
    expected = goldens.manifest("var", f"var_{name}")
    assert ours == expected
    assert list(ours) == list(expected)


def test_published_tokeniser_is_told_from_shapes():
    state = meta_state(goldens.manifest("var", "vae_ch160v4096z32"))
    arch = tokeniser_arch_of(state)
    arch = {key: tuple(value) if isinstance(value, list) else value for key, value in arch.items()}
    assert VQVAEArch(**arch) == VQVAEArch(patch_nums=PATCH_NUMS[256])


@pytest.mark.parametrize("name", IMAGE_SIDE)
def test_published_transformers_are_told_from_shapes(name):
    state = meta_state(goldens.manifest("var", f"var_{name}"))
    sides = PATCH_NUMS[IMAGE_SIDE[name]]
    state["lvl_1L"] = torch.repeat_interleave(torch.arange(len(sides)), torch.tensor(sides) ** 2)[None].float()
    arch = transformer_arch_of(state)
    assert VARArch(**{**arch, "patch_nums": tuple(arch["patch_nums"])}) == published(name)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Transformer(TINY)


def as_merged_by_the_original(state):
    return {name: value.float() for name, value in state.items()}


WRAPPERS = {
    "plain": lambda state: state,
    "trainer": lambda state: {
        "epoch": 3,
        "iter": 7,
        "trainer": {"config": {}, "var_wo_ddp": state},
        "args": {"depth": 2},
    },
    "var_wo_ddp": lambda state: {"var_wo_ddp": state},
    "state_dict": lambda state: {"state_dict": state},
    "model": lambda state: {"model": state},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "ddp": lambda state: {f"module.{name}": value for name, value in state.items()},
    "merged": as_merged_by_the_original,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_loads(model, wrapper, tmp_path):
    torch.save(WRAPPERS[wrapper](model.state_dict()), tmp_path / "var.pth")
    family = FAMILY()
    loaded = family.load(checkpoint.read(tmp_path / "var.pth", weights="any"))
    want, have = model.state_dict(), loaded.state_dict()
    assert list(want) == list(have)
    for name, value in want.items():
        assert have[name].dtype == value.dtype
        assert torch.equal(have[name], value), name
    assert [block.drop_path for block in loaded.blocks] == [block.drop_path for block in model.blocks]


def test_our_own_file_keeps_the_constructor_arguments(model, tmp_path):
    arch = {
        "depth": 2,
        "embed_dim": 16,
        "heads": 2,
        "patch_nums": [1, 2, 3],
        "num_classes": 3,
        "vocabulary": 11,
        "code_width": 5,
        "drop_path": 0.3,
    }
    checkpoint.write(
        tmp_path / "var.safetensors", model.state_dict(), metadata={"family": "var", "arch": arch, "weights": "raw"}
    )
    loaded = FAMILY().load(checkpoint.read(tmp_path / "var.safetensors", weights="raw"))
    assert [block.drop_path for block in loaded.blocks] == pytest.approx([0, 0.3])
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_state_dict_round_trip_needs_no_mask(model):
    other = Transformer(TINY)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.pos_1LC, model.pos_1LC)
    assert not any(buffer.ndim == 4 for buffer in other.buffers())


@pytest.mark.parametrize("name", ["lvl_1L", "attn_bias_for_masking", "blocks.1.attn.zero_k_bias"])
def test_damaged_derived_entries_are_refused(model, name, tmp_path):
    state = as_merged_by_the_original(model.state_dict())
    state[name].view(-1)[0] += 1
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(ValueError, match=name):
        FAMILY().load(checkpoint.read(tmp_path / "var.pth", weights="any"))


def test_a_wrong_depth_is_one_line(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "var_d2.pth")
    deeper = Transformer(VARArch(**{**{f: getattr(TINY, f) for f in TINY.__slots__}, "depth": 3}))
    with pytest.raises(ValueError, match=r"var_d2.pth.*3 blocks.*2 blocks") as caught:
        checkpoint.read(tmp_path / "var_d2.pth", weights="any").load_into(deeper)
    assert "\n" not in str(caught.value)


def test_a_foreign_file_is_refused(tmp_path):
    torch.save({"pos_1LC": torch.zeros(1, 4, 8), "conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"not a VAR state dict.*missing"):
        FAMILY().load(checkpoint.read(tmp_path / "other.pth", weights="any"))
    with pytest.raises(ValueError, match=r"other\.pth.*not a VQ-VAE of VAR"):
        read_tokeniser(tmp_path / "other.pth")


def test_published_layout_of_a_tokeniser_loads(tmp_path):
    arch = VQVAEArch(patch_nums=PATCH_NUMS[256], ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, vocab_size=16)
    torch.manual_seed(2)
    vqvae = VQVAE(arch)
    torch.save(vqvae.state_dict(), tmp_path / "vae.pth")
    loaded = read_tokeniser(tmp_path / "vae.pth")
    for name, value in vqvae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_mask_is_block_causal():
    mask = attention_mask(torch.tensor([[0, 1, 1]]))[0, 0]
    assert torch.equal(mask.isinf(), torch.tensor([[False, True, True], [False, False, False], [False, False, False]]))
