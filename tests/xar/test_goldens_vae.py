"""The KL-16 autoencoder against the original code (spec tolerance 2e-5 of the largest entry)."""

import pytest
import torch

from neon.networks.autoencoder import kl_to_unit_normal, mean_and_std, sample_posterior
from tests import goldens
from tests.goldens import tensor
from xar.vae import KL16, KL16Arch

TINY = goldens.collect("xar", "vae_tiny*")
REAL = goldens.collect("xar", "vae_real_*")


def check(actual, expected, what):
    goldens.assert_close(actual, expected, what=what, atol=2e-5 * expected.abs().max().item())


def load(file):
    config, arrays = goldens.load(file)
    return config, {name: tensor(array) for name, array in arrays.items()}


@torch.no_grad()
@pytest.mark.parametrize("file", TINY, ids=lambda file: file.stem)
def test_tiny(file):
    config, expected = load(file)
    fields = (
        "ch",
        "ch_mult",
        "num_res_blocks",
        "z_channels",
        "resolution",
        "encoder_attn_resolutions",
        "decoder_attn_resolutions",
    )
    arch = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key in fields}
    vae = goldens.seed_by_name(KL16(KL16Arch(**arch)))
    check(vae.encoder(expected["image"]), expected["encoder_out"], "encoder_out")
    moments = vae.encode(expected["image"])
    check(moments, expected["moments"], "moments")
    mean, std = mean_and_std(moments)
    check(mean, expected["mean"], "mean")
    check(std, expected["std"], "std")
    check(2 * std.log(), expected["logvar"], "logvar")
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(config["sample_seed"]))
    check(sample_posterior(moments, noise), expected["sample"], "sample")
    check(kl_to_unit_normal(moments), expected["kl"], "kl")
    check(vae.decode(expected["latent"]), expected["decoded"], "decoded")


@pytest.mark.parametrize("file", TINY, ids=lambda file: file.stem)
def test_log_variance_is_clipped(file):
    expected = load(file)[1]
    std = mean_and_std(expected["ext_moments"])[1]
    # small standard deviations count as much as large ones
    torch.testing.assert_close(std, expected["ext_std"], rtol=2e-6, atol=0)
    torch.testing.assert_close(2 * std.log(), expected["ext_logvar"], rtol=2e-6, atol=0)
    torch.testing.assert_close(kl_to_unit_normal(expected["ext_moments"]), expected["ext_kl"], rtol=2e-6, atol=0)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("file", REAL, ids=lambda file: file.stem)
def test_real_size(file):
    config, expected = load(file)
    vae = goldens.seed_by_name(KL16(KL16Arch(latent_scale=config["scale"])))
    decoded = vae.from_latents(expected["latent"])
    check(decoded[:, :, 3::8, 5::8], expected["decoded_sub"], "decoded_sub")
    check(decoded[:, :, 100], expected["decoded_row100"], "decoded_row100")
    check(decoded.mean(dim=(0, 2, 3)), expected["decoded_mean"], "decoded_mean")
    check(decoded.std(dim=(0, 2, 3)), expected["decoded_std"], "decoded_std")
    image = (expected["image_u8_32"] / 127.5 - 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    check(vae.encode(image), expected["moments"], "moments")


def test_state_dict_is_the_published_one():
    with torch.device("meta"):
        vae = KL16(KL16Arch())
    assert list(goldens.manifest_of(vae).items()) == list(goldens.manifest("xar", "vae_kl16").items())


def test_latents_have_the_published_scale():
    vae = KL16(KL16Arch(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=2))
    moments, noise = torch.zeros(1, 4, 3, 3), torch.ones(1, 2, 3, 3)
    assert torch.equal(vae.to_latents(moments, noise), torch.full((1, 2, 3, 3), 0.2325))
