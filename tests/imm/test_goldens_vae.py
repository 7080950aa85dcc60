"""The SD autoencoder, its two sets of names, and IMM's latent encoder against the original code."""

import pytest
import torch

from imm.vae import (
    ATTENTION,
    LEGACY_ATTENTION,
    SD_VAE,
    StabilityEncoder,
    diffusers_names,
    from_diffusers,
    layout_from_diffusers,
    to_diffusers,
)
from neon.autoencoder import KLAutoencoder
from neon.quantize import to_uint8
from tests import goldens
from tests.goldens import tensor

FILES = goldens.collect("imm", "vae*.npz", kind="vae")


def seeded_encoder(config: dict) -> StabilityEncoder:
    """Weights seeded by their diffusers names, loaded through the name mapping as a published file would be."""
    layout = layout_from_diffusers(config["vae"])
    vae = KLAutoencoder(layout)
    shapes = {name: value.shape for name, value in to_diffusers(vae.state_dict(), layout).items()}
    published = {name: goldens.name_seeded(name, shape) for name, shape in shapes.items()}
    vae.load_state_dict(from_diffusers(published, layout))
    return StabilityEncoder(vae, **config["encoder"])


@pytest.fixture(params=FILES, ids=lambda file: file.stem, scope="module")
def case(request):
    config, arrays = goldens.load(request.param)
    return config, {name: tensor(array) for name, array in arrays.items()}, seeded_encoder(config)


def check(actual, expected, what):
    """rtol 1e-4, atol 1e-5 of the standard deviation (spec, section 9)."""
    goldens.assert_close(actual, expected, what=what, atol=1e-5 * expected.std().item(), rtol=1e-4)


def check_bytes(images, expected):
    """Off by one on fewer than 0.5 % of the pixels: truncation meets float rounding."""
    error = (to_uint8(images, "truncate").int() - expected.int()).abs()
    assert error.max() <= 1
    assert (error > 0).float().mean() < 0.005


def seeded_noise(seed: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_normalisation(case):
    _, expected, encoder = case
    assert torch.equal(encoder.scale.flatten(), expected["scale"])
    assert torch.equal(encoder.bias.flatten(), expected["bias"])


@torch.no_grad()
def test_encode(case):
    config, expected, encoder = case
    mean_std = encoder.encode_pixels(expected["pixels"])
    check(mean_std, expected["raw_mean_std"], "raw_mean_std")
    noise = seeded_noise(config["manual_seed_encode_latents"], expected["final"])
    check(encoder.to_latents(expected["raw_mean_std"], noise), expected["final"], "final")


@torch.no_grad()
def test_decode(case):
    config, expected, encoder = case
    check((expected["z"] - encoder.bias) / encoder.scale, expected["z_raw"], "z_raw")
    check(encoder.vae.decode(expected["z_raw"]), expected["decoder_float"], "decoder_float")
    decoded = encoder.decode(expected["z"])
    check(decoded, expected["decoder_float"], "decode")
    check_bytes(decoded, expected["decoded_u8"])
    # decode(cat[z, 0.1 |z|]) of the original: mean and standard deviation already in the network's units
    z = expected["z"] + seeded_noise(config["manual_seed_decode8"], expected["z"]) * (0.1 * expected["z"].abs())
    check_bytes(encoder.decode(z), expected["decoded8_u8"])


def manifest_under(attention: dict) -> dict[str, list]:
    with torch.device("meta"):
        vae = KLAutoencoder(SD_VAE)
    ours = goldens.manifest_of(vae)
    is_matrix = [f".attn_1.{name}.weight" for name in ("q", "k", "v", "proj_out")]
    without_kernel = {name: [*value[:2], value[-1]] if name.endswith(tuple(is_matrix)) else value for name, value in ours.items()}
    return {theirs: without_kernel[name] for name, theirs in diffusers_names(SD_VAE, attention).items()}


@pytest.mark.parametrize(("model", "attention"), [("sd_vae_ft_ema", ATTENTION), ("sd_vae_ft_ema_legacy_names", LEGACY_ATTENTION)])
def test_names_are_the_published_ones(model, attention):
    expected = goldens.manifest("imm", model)
    assert list(manifest_under(attention).items()) == list(expected.items())
    with torch.device("meta"):
        vae = KLAutoencoder(SD_VAE)
    tensors = {name: torch.empty(value[:-1], device="meta") for name, value in expected.items()}
    renamed = from_diffusers(tensors, SD_VAE)
    assert {name: value.shape for name, value in renamed.items()} == {name: value.shape for name, value in vae.state_dict().items()}


def test_unknown_names_reach_the_strict_load():
    layout = SD_VAE
    assert set(from_diffusers({"encoder.conv_in.wait": torch.zeros(1)}, layout)) == {"encoder.conv_in.wait"}
