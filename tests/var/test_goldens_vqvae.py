"""The VQ-VAE against the original code: indices exactly, images and features to rounding (spec tolerance 5e-5)."""

from pathlib import Path

import pytest
import torch

from tests import goldens
from tests.goldens import assert_close, tensor
from var.vqvae import VQVAE, VQVAEArch

FILES = goldens.collect("var", "vqvae_*")
ATOL = 5e-5
FEATURES_ATOL = 1e-5  # sums of code vectors; what has passed the deep encoder differs by more between thread counts


def arch_of(config: dict) -> VQVAEArch:
    keys = ("vocab_size", "z_channels", "ch", "using_znorm", "share_quant_resi", "quant_resi")
    return VQVAEArch(patch_nums=tuple(config["v_patch_nums"]), **{key: config[key] for key in keys if key in config})


def marked(file: Path) -> object:
    is_real_size = goldens.config_of(file)["ch"] >= 128
    return pytest.param(file, id=file.stem, marks=[pytest.mark.slow] if is_real_size else [])


@pytest.fixture(params=map(marked, FILES), scope="module")
def case(request):
    config, arrays = goldens.load(request.param)
    return (
        config,
        {name: tensor(array) for name, array in arrays.items()},
        goldens.seed_by_name(VQVAE(arch_of(config))).eval(),
    )


def per_scale(arrays: dict, name: str) -> list:
    return [
        arrays[f"{name}_{i}"] for i in range(sum(key.startswith(f"{name}_") and key[-1].isdigit() for key in arrays))
    ]


@torch.no_grad()
def test_image_to_indices(case):
    config, arrays, vqvae = case
    images = arrays["img_u8"] / 127.5 - 1
    f = vqvae.encode(images)
    assert_close(f, arrays["f"], what="f", atol=ATOL)
    if "encoder_out" in arrays:
        assert_close(vqvae.encoder(images), arrays["encoder_out"], what="encoder_out", atol=ATOL)
    found = vqvae.image_to_indices(images)
    assert len(found) == len(config["v_patch_nums"])
    for expected, indices in zip(per_scale(arrays, "idx"), found, strict=True):
        assert torch.equal(indices, expected)


@torch.no_grad()
def test_features_of_every_scale(case):
    _, arrays, vqvae = case
    scales = list(vqvae.quantize.scales(arrays["f"]))
    for (indices, _), expected in zip(scales, per_scale(arrays, "idx"), strict=True):
        assert torch.equal(indices, expected)
    assert_close(scales[-1][1], arrays["fhat_final"], what="fhat_final", atol=FEATURES_ATOL)
    for i, expected in enumerate(per_scale(arrays, "fhat")):
        assert_close(scales[i][1], expected, what=f"fhat_{i}", atol=FEATURES_ATOL)


@torch.no_grad()
def test_indices_to_features_and_next_input(case):
    config, arrays, vqvae = case
    quantize = vqvae.quantize
    indices = per_scale(arrays, "idx")
    assert_close(quantize.features_of(indices), arrays["fhat_final"], what="features_of", atol=FEATURES_ATOL)
    if "embed_to_fhat_last" in arrays:
        assert_close(
            quantize.features_of(indices), arrays["embed_to_fhat_last"], what="embed_to_fhat_last", atol=FEATURES_ATOL
        )
    stride = config["var_input_stride"]
    assert_close(
        quantize.teacher_input(indices)[:, ::stride], arrays["var_input"], what="var_input", atol=FEATURES_ATOL
    )
    f_hat = quantize.empty(indices[0].shape[0])
    expected_next = per_scale(arrays, "next")
    for scale, index in enumerate(indices):
        f_hat = quantize.add_scale(f_hat, quantize.embed(index), scale)
        if not expected_next:
            continue
        if scale + 1 < quantize.num_scales:
            tokens = quantize.input_of_scale(f_hat, scale + 1)
            assert_close(
                tokens.transpose(1, 2).reshape(expected_next[scale].shape),
                expected_next[scale],
                what=f"next_{scale}",
                atol=FEATURES_ATOL,
            )
        else:
            assert_close(f_hat, expected_next[scale], what=f"next_{scale}", atol=FEATURES_ATOL)


@torch.no_grad()
def test_decoder(case):
    config, arrays, vqvae = case
    sub = config["sub"]
    unclipped = vqvae.decode_unclipped(arrays["fhat_final"])
    image = vqvae.decode(arrays["fhat_final"])
    assert_close(unclipped[..., ::sub, ::sub], arrays["decoder_out_preclamp"], what="decoder_out_preclamp", atol=ATOL)
    assert_close(image[..., ::sub, ::sub], arrays["recon"], what="recon", atol=ATOL)
    statistics = torch.stack([image.mean(), image.std(), unclipped.mean(), unclipped.std()])
    assert_close(statistics, arrays["recon_mean_std"], what="recon_mean_std", atol=ATOL)
    if "recon_from_idx" in arrays:
        assert_close(
            vqvae.indices_to_image(per_scale(arrays, "idx")), arrays["recon_from_idx"], what="recon_from_idx", atol=ATOL
        )


def test_state_dict_is_the_published_one():
    with torch.device("meta"):
        vqvae = VQVAE(VQVAEArch(patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)))
    expected = goldens.manifest("var", "vae_ch160v4096z32")
    assert list(goldens.manifest_of(vqvae).items()) == list(expected.items())
