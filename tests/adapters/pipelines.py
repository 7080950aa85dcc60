"""Tiny pipelines of the three kinds, built here: no weights are fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
transformers = pytest.importorskip("transformers", reason="the extra [diffusers] is not installed")

PROMPTS = ["a red coat", "a blue shoe", "the old red bag"]


def scheduler(name: str = "DDIMScheduler", **options):
    return getattr(diffusers, name)(**{"num_train_timesteps": 40, "clip_sample": False, **options})


def flow_scheduler():
    return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=40, shift=2.0)


def unet(size: int = 16, widths=(8, 16)):
    torch.manual_seed(1)
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=widths,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def autoencoder():
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        shift_factor=0.1,
        scaling_factor=0.5,
    )


def unconditional(noise=None):
    noise = scheduler() if noise is None else noise
    kind = diffusers.DDIMPipeline if isinstance(noise, diffusers.DDIMScheduler) else diffusers.DDPMPipeline
    return kind(unet(), noise)


def class_conditional(noise=None):
    torch.manual_seed(3)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # the pipeline's null label is 1000, whatever the network
        norm_num_groups=4,
    )
    return diffusers.DiTPipeline(transformer, autoencoder(), scheduler() if noise is None else noise)


def text_conditional(folder: Path, noise=None):
    torch.manual_seed(4)
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    letters = sorted(set("".join(PROMPTS)) - {" "})
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    files = folder / "tokenizer-files"
    files.mkdir()
    (files / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (files / "merges.txt").write_text("#version: 0.2\n")  # every letter is a token
    tokenizer = transformers.CLIPTokenizer.from_pretrained(files, model_max_length=16)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=network,
        scheduler=scheduler(prediction_type="v_prediction", steps_offset=1) if noise is None else noise,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


KINDS = ("unconditional", "class", "text")


def saved(kind: str, folder: Path, noise=None) -> Path:
    """The pipeline folder of a kind, and prompts.txt beside it."""
    make = {
        "unconditional": lambda: unconditional(noise),
        "class": lambda: class_conditional(noise),
        "text": lambda: text_conditional(folder, noise),
    }
    make[kind]().save_pretrained(folder / kind)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder / kind
