"""The SD autoencoder, its two sets of names, and IMM's latent encoder against the original code."""

import pytest
import torch

from imm.diffusers_names import ATTENTION, LEGACY_ATTENTION, diffusers_names, from_diffusers
from imm.encoders import StabilityEncoder
from imm.load import arch_from_diffusers
from imm.presets import SD_VAE
from neon.networks.autoencoder import ConvArch, KLAutoencoder
from neon.quantize import to_uint8
from tests import goldens
from tests.goldens import tensor
from tests.imm.published import to_diffusers

WHERE_THE_CONFIG_IS_SILENT = {"raw_mean": (1.56, -0.695, 0.483, 0.729), "raw_std": (5.27, 5.91, 4.21, 4.31)}
"""The original's default constants. Its published model's configuration names others, which are ours
(docs/differences.md)."""
FILES = goldens.collect("imm", "vae*.npz", kind="vae")


def seeded_encoder(config: dict) -> StabilityEncoder:
    """Weights seeded by their diffusers names, loaded through the name mapping as a published file would be."""
    arch = arch_from_diffusers(config["vae"])
    vae = KLAutoencoder(arch)
    shapes = {name: value.shape for name, value in to_diffusers(vae.state_dict(), arch).items()}
    published = {name: goldens.name_seeded(name, shape) for name, shape in shapes.items()}
    vae.load_state_dict(from_diffusers(published, arch))
    return StabilityEncoder(vae, **{**WHERE_THE_CONFIG_IS_SILENT, **config["encoder"]})


@pytest.fixture(params=FILES, ids=lambda file: file.stem, scope="module")
def case(request):
    config, arrays = goldens.load(request.param)
    return config, {name: tensor(array) for name, array in arrays.items()}, seeded_encoder(config)


def check(actual, expected, what, atol=1e-5):
    """rtol 1e-4, atol 1e-5 of the standard deviation (spec, section 9)."""
    goldens.assert_close(actual, expected, what=what, atol=atol * expected.std().item(), rtol=1e-4)


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
    # the vectors of the real size are 1.3e-5 away from the same decoder in float64, ours 4e-6 (measured, one thread)
    check(encoder.vae.decode(expected["z_raw"]), expected["decoder_float"], "decoder_float", atol=2e-5)
    decoded = encoder.decode(expected["z"])
    check(decoded, expected["decoder_float"], "decode", atol=2e-5)
    check_bytes(decoded, expected["decoded_u8"])
    # decode(cat[z, 0.1 |z|]) of the original: mean and standard deviation already in the network's units
    z = expected["z"] + seeded_noise(config["manual_seed_decode8"], expected["z"]) * (0.1 * expected["z"].abs())
    check_bytes(encoder.decode(z), expected["decoded8_u8"])


def test_the_published_models_constants_are_the_default():
    """A latent at the published mean becomes 0, one that lies one published standard deviation above it 0.5."""
    mean, std = (0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003)
    encoder = StabilityEncoder(
        KLAutoencoder(ConvArch(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=4, has_moments=True))
    )
    mean_std = torch.tensor([*mean, *std])[None, :, None, None]
    for noise, expected in ((0.0, 0.0), (1.0, 0.5)):
        latents = encoder.to_latents(mean_std, torch.full((1, 4, 1, 1), noise))
        torch.testing.assert_close(latents, torch.full_like(latents, expected), rtol=1e-6, atol=1e-6)


def manifest_under(attention: dict) -> dict[str, list]:
    with torch.device("meta"):
        vae = KLAutoencoder(SD_VAE)
    ours = goldens.manifest_of(vae)
    is_matrix = [f".attn_1.{name}.weight" for name in ("q", "k", "v", "proj_out")]
    without_kernel = {
        name: [*value[:2], value[-1]] if name.endswith(tuple(is_matrix)) else value for name, value in ours.items()
    }
    return {theirs: without_kernel[name] for name, theirs in diffusers_names(SD_VAE, attention).items()}


@pytest.mark.parametrize(
    ("model", "attention"), [("sd_vae_ft_ema", ATTENTION), ("sd_vae_ft_ema_legacy_names", LEGACY_ATTENTION)]
)
def test_names_are_the_published_ones(model, attention):
    expected = goldens.manifest("imm", model)
    assert list(manifest_under(attention).items()) == list(expected.items())
    with torch.device("meta"):
        vae = KLAutoencoder(SD_VAE)
    tensors = {name: torch.empty(value[:-1], device="meta") for name, value in expected.items()}
    renamed = from_diffusers(tensors, SD_VAE)
    assert {name: value.shape for name, value in renamed.items()} == {
        name: value.shape for name, value in vae.state_dict().items()
    }


def test_unknown_names_reach_the_strict_load():
    arch = SD_VAE
    assert set(from_diffusers({"encoder.conv_in.wait": torch.zeros(1)}, arch)) == {"encoder.conv_in.wait"}
