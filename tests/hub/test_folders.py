"""Folders as transformers and diffusers save them: merged, and loaded again by the library that wrote them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from neon.merge_files.merging import merge
from neon.merge_files.pairing import Request

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")


def nudged(model: nn.Module, seed: int) -> nn.Module:
    """The model as a short fine-tune would leave it: every parameter moved a little."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def assert_merged(found: nn.Module, base: nn.Module, synth: nn.Module, w: float) -> None:
    """The loaded model's parameters are the merge in memory, bit for bit (float32)."""
    others = dict(synth.named_parameters())
    for (name, value), (_, b) in zip(found.named_parameters(), base.named_parameters(), strict=True):
        assert torch.equal(value, torch.add(b, others[name] - b, alpha=-w)), name


def gpt(seed: int) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=101, n_positions=16)
    return nudged(transformers.GPT2LMHeadModel(config), seed)  # its head is tied to its embedding


@pytest.mark.parametrize("shards", [1, 3])
def test_a_transformers_folder(tmp_path: Path, shards: int) -> None:
    base, synth = gpt(1), gpt(2)
    size = "1GB" if shards == 1 else "60KB"
    base.save_pretrained(tmp_path / "base", max_shard_size=size)
    synth.save_pretrained(tmp_path / "synth")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file() == (shards > 1)
    merge(tmp_path / "base", tmp_path / "synth", tmp_path / "out", Request(w=(1.5,)))
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert_merged(found, base, synth, 1.5)
    tokens = torch.arange(10)[None]
    merged = gpt(1)
    for parameter, b, s in zip(merged.parameters(), base.parameters(), synth.parameters(), strict=True):
        parameter.data = torch.add(b.data, s.data - b.data, alpha=-1.5)
    assert torch.equal(found(tokens).logits, merged.eval()(tokens).logits)
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    # the result is a base again
    about = merge(tmp_path / "out", tmp_path / "synth", tmp_path / "again", Request(w=(0.0,)))
    assert about["parameters"] == len(dict(base.named_parameters()))


def test_a_transformers_folder_of_pickles_becomes_safetensors(tmp_path: Path) -> None:
    base, synth = gpt(1), gpt(2)
    for model, name in ((base, "base"), (synth, "synth")):
        model.config.save_pretrained(tmp_path / name)
        torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
    merge(tmp_path / "base", tmp_path / "synth", tmp_path / "out", Request(w=(0.7,)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert_merged(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out"), base, synth, 0.7)


def test_a_folder_of_the_hubs_cache_is_links(tmp_path: Path) -> None:
    base, synth = gpt(1), gpt(2)
    base.save_pretrained(tmp_path / "plain")
    synth.save_pretrained(tmp_path / "synth")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.copy(path, blobs / f"{number:064d}")
        os.symlink(f"../../blobs/{number:064d}", snapshot / path.name)
    merge(snapshot, tmp_path / "synth", tmp_path / "out", Request(w=(1.0,)))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert_merged(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out"), base, synth, 1.0)


def pipeline(seed: int) -> object:
    """Stable Diffusion, a few thousand parameters: UNet, autoencoder, text encoder."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=100,
        max_position_embeddings=12,
    )  # fmt: skip
    text_encoder = transformers.CLIPTextModel(config)
    nudged(unet, seed)
    return diffusers.StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=None, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def test_a_diffusers_pipeline(tmp_path: Path) -> None:
    base, synth = pipeline(1), pipeline(2)
    base.save_pretrained(tmp_path / "base")
    synth.save_pretrained(tmp_path / "synth")
    merge(tmp_path / "base", tmp_path / "synth", tmp_path / "out", Request(w=(1.2,)))
    loaded = [diffusers.UNet2DConditionModel.from_pretrained(tmp_path / name / "unet") for name in ("base", "synth")]
    found = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", tokenizer=None, safety_checker=None)
    assert_merged(found.unet, *loaded, 1.2)
    for part in ("vae", "text_encoder"):
        theirs = dict(getattr(base, part).named_parameters())
        assert all(torch.equal(value, theirs[name]) for name, value in getattr(found, part).named_parameters())
    sample, step, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)
    expected = pipeline(1).unet
    for parameter, b, s in zip(expected.parameters(), *(m.parameters() for m in loaded), strict=True):
        parameter.data = torch.add(b.data, s.data - b.data, alpha=-1.2)
    outputs = found.unet(sample, step, text).sample, expected.eval()(sample, step, text).sample
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)  # equal weights at other addresses: other kernels


def test_variants_and_missing_parts(tmp_path: Path) -> None:
    for name, seed in (("base", 1), ("synth", 2)):
        made = pipeline(seed)
        made.save_pretrained(tmp_path / name)
        made.to(torch.float16).save_pretrained(tmp_path / name, variant="fp16")
    merge(tmp_path / "base", tmp_path / "synth", tmp_path / "half", Request(w=(1.0,), variant="fp16"))
    names = [path.name for path in (tmp_path / "half" / "unet").glob("*.safetensors")]
    assert names == ["diffusion_pytorch_model.fp16.safetensors"]
    half = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "half" / "unet", variant="fp16")
    assert half.dtype in (torch.float16, torch.float32)
    shutil.rmtree(tmp_path / "synth" / "vae")
    with pytest.raises(ValueError, match=r"has no weights in vae.*--allow-missing 'vae'"):
        merge(tmp_path / "base", tmp_path / "synth", tmp_path / "out", Request(w=(1.0,)))
    assert not (tmp_path / "out").exists()
    merge(tmp_path / "base", tmp_path / "synth", tmp_path / "out", Request(w=(1.0,), allow_missing=("vae",)))
    assert (tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    base, synth = gpt(1), gpt(2)
    base.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    with torch.no_grad():
        synth.transformer.h[2].mlp.c_proj.bias[0] = torch.nan
    synth.save_pretrained(tmp_path / "synth")
    with pytest.raises(ValueError, match=r"h\.2\.mlp\.c_proj\.bias: differs .* not finite"):
        merge(tmp_path / "base", tmp_path / "synth", tmp_path / "out", Request(w=(1.0,)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "synth"]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is there already"):
        merge(tmp_path / "base", tmp_path / "base", tmp_path / "there", Request(w=(1.0,)))
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    lost = next(iter(index["weight_map"].values()))
    (tmp_path / "base" / lost).unlink()
    with pytest.raises(FileNotFoundError, match=lost):
        merge(tmp_path / "base", tmp_path / "synth", tmp_path / "out", Request(w=(1.0,)))
