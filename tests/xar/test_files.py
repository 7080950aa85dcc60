"""xAR's checkpoints: the layouts in use, strictness, tables that must belong to the network, and the merge of -inf
masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from neon.checkpoints import checkpoint
from neon.merge import LiveMerge, reverse_merge
from neon.seeds import ImageRng
from tests.xar.test_family import opened, pictures
from tests.xar.test_transformer import tiny
from xar.family import XAR
from xar.load import read_autoencoder
from xar.options import Sampling

LAYOUTS = {
    "base": lambda state: state,  # xAR-B.pth: a bare state dict
    "finetuned": lambda state: {"model_ema": {k: torch.nn.Parameter(v) for k, v in state.items()}, "epoch": 3},
    "compiled": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts(layout, tmp_path: Path):
    model, file = tiny(), tmp_path / "model.pth"
    torch.save(LAYOUTS[layout](model.state_dict()), file)
    loaded = XAR().load(checkpoint.read(file))
    assert loaded.num_heads == model.num_heads
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_our_own_file_states_its_sizes(tmp_path: Path):
    model, family = tiny(), XAR()
    file = tmp_path / "model.safetensors"
    torch.save(model.state_dict(), tmp_path / "model.pth")
    arch = family.arch_of(checkpoint.read(tmp_path / "model.pth"))
    checkpoint.write(file, model.state_dict(), metadata={"family": "xar", "arch": arch, "weights": "ema"})
    assert torch.equal(family.load(checkpoint.read(file)).pred.weight, model.pred.weight)


@pytest.mark.parametrize("name", ["mask", "encoder_blocks.0.attn.rope.freqs_cos"])
@pytest.mark.parametrize("damage", ["moved", "nan"])
def test_tables_of_another_network_are_refused(name, damage, tmp_path: Path):
    state = dict(tiny().state_dict())
    state[name] = state[name].roll(1, 0) if damage == "moved" else state[name] * torch.nan
    if name == "mask" and damage == "moved":
        state[name] = state[name].transpose(2, 3)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=rf"model.pth: the table '{name}' is not that of an xAR model"):
        XAR().load(checkpoint.read(tmp_path / "model.pth"))


def test_a_missing_tensor_is_an_error(tmp_path: Path):
    state = dict(tiny().state_dict())
    del state["decoder_blocks.1.mlp.fc2.bias"]
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"decoder_blocks\.1\.mlp\.fc2\.bias"):
        XAR().load(checkpoint.read(tmp_path / "model.pth"))


@torch.no_grad()
def test_autoencoder_files(tmp_path: Path):
    """Our own, which states its sizes, and the published layout: the weights under `model`."""
    autoencoder, images = opened().autoencoder, pictures(1).float() / 127.5 - 1
    arch = {
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "num_groups": 16,
        "resolution": 32,
        "encoder_attn_resolutions": [],
    }
    file = tmp_path / "autoencoder.safetensors"
    checkpoint.write(file, autoencoder.state_dict(), metadata={"arch": arch | {"latent_scale": 0.5}})
    loaded = read_autoencoder(file)
    assert loaded.latent_scale == 0.5
    assert torch.equal(loaded.encode(images), autoencoder.encode(images))
    torch.save({"model": autoencoder.state_dict()}, tmp_path / "kl16.ckpt")
    with pytest.raises(ValueError, match=r"kl16.ckpt does not fit: expected KL16"):
        read_autoencoder(
            tmp_path / "kl16.ckpt"
        )  # the published layout states no sizes: it must have the published ones


def synth_of(base: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        k: v + 0.01 * torch.randn(v.shape, generator=generator) if k in names else v.clone() for k, v in base.items()
    }


def test_a_merge_keeps_the_mask_finite_where_it_was(tmp_path: Path):
    """The naive formula makes -inf - -inf = nan of it; merged, written, read again and sampled it must be the
    base's."""
    model = tiny()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    names = {name for name, _ in model.named_parameters()}
    synth = synth_of(base, names)
    merged = reverse_merge(base, synth, 1.5, parameters=names)
    assert torch.equal(merged["mask"], base["mask"])
    checkpoint.write(tmp_path / "neon.safetensors", merged, metadata={"family": "xar", "weights": "ema", "w": 1.5})
    loaded = XAR().load(checkpoint.read(tmp_path / "neon.safetensors"))
    live = tiny()
    LiveMerge(live, base, synth).set_w(1.5)

    how, labels = Sampling(num_steps=2, cfg_scale=2.0), torch.tensor([1, 2])
    from_file, from_memory, unmerged = (
        XAR().sample(m, ImageRng([0, 1]), labels, how)[0] for m in (loaded, live, tiny())
    )
    assert torch.isfinite(from_file).all()
    assert torch.equal(from_file, from_memory)
    assert (from_file - unmerged).abs().max() > 1e-3
