"""IMM under the family protocol: draws, codes, autoencoders, checkpoints."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from imm.diffusers_names import LEGACY_ATTENTION, diffusers_names
from imm.family import IMM
from imm.load import arch_from_diffusers, read_autoencoder
from imm.options import Objective, Sampling
from neon.checkpoints import checkpoint
from neon.networks.autoencoder import KLAutoencoder
from neon.quantize import to_uint8
from neon.seeds import SharedRng, image_rng
from tests import goldens
from tests.imm.published import to_diffusers

PIXELS = {
    "class_name": "IMMPrecond",
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 3,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.3,
    "f_type": "simple_edm",
    "eps": 0.006,
}
LATENTS = {
    "class_name": "IMMPrecond",
    "img_resolution": 4,
    "img_channels": 4,
    "label_dim": 3,
    "num_classes": 3,
    "model_type": "DiT",
    "patch_size": 2,
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "temb_type": "stride",
}
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
CPU = torch.device("cpu")


def model_of(arch):
    model = goldens.seed_by_name(IMM().build(arch))
    return model.eval()


def labels_of(batch):
    return torch.arange(batch) % 3


@pytest.fixture
def vae_folder(tmp_path):
    """A folder as on the Hub: config.json and weights under diffusers' names."""
    arch = arch_from_diffusers(VAE)
    tensors = to_diffusers(goldens.seed_by_name(KLAutoencoder(arch)).state_dict(), arch)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(VAE))
    return tmp_path


@pytest.mark.parametrize("sampler", ["pushforward", "restart"])
def test_an_image_depends_on_its_seed_and_label_only(sampler):
    family, model = IMM(), model_of(PIXELS)
    how = Sampling(num_steps=3, cfg_scale=1.5, sampler=sampler)
    together, labels = family.sample(model, image_rng(5, range(4), "cpu"), labels_of(4), how)
    alone, _ = family.sample(model, image_rng(5, [2], "cpu"), labels_of(4)[2:3], how)
    assert labels.tolist() == [0, 1, 2, 0]
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[3]).abs().max() > 0.01  # same class, another seed
    other, _ = family.sample(model, image_rng(5, [2], "cpu"), torch.tensor([0]), how)
    assert (other - alone).abs().max() > 1e-3


def test_labels_are_drawn_if_none_are_given():
    family, model = IMM(), model_of(PIXELS)
    _, labels = family.sample(model, image_rng(0, range(64), "cpu"), None, Sampling(num_steps=1))
    assert set(labels.tolist()) == {0, 1, 2}
    _, drawn = family.sample(model, image_rng(0, [7], "cpu"), None, Sampling(num_steps=1))
    assert drawn.item() == labels[7].item()


def test_float64_states_agree_with_float32():
    family, model = IMM(), model_of(PIXELS)
    exact, _ = family.sample(model, image_rng(0, range(2), "cpu"), labels_of(2), Sampling(num_steps=4, state="float64"))
    single, _ = family.sample(model, image_rng(0, range(2), "cpu"), labels_of(2), Sampling(num_steps=4))
    assert exact.dtype == single.dtype == torch.float32
    torch.testing.assert_close(single, exact, rtol=1e-3, atol=1e-4)
    assert not torch.equal(single, exact)


def test_every_draw_is_there_and_equal_within_a_group():
    family, how = IMM(), Objective(group_size=4)
    codes = torch.zeros(12, 1, 8, 8, dtype=torch.uint8)
    draws = family.draw(SharedRng(12, torch.Generator().manual_seed(0)), codes, labels_of(12), how)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "u_t": (12,),
        "u_s": (12,),
        "u_drop": (12,),
        "noise": (12, 1, 8, 8),
    }
    for name in ("u_t", "u_s"):
        groups = draws[name].unflatten(0, (3, 4))
        assert draws[name].dtype == torch.float64
        assert torch.equal(groups, groups[:, :1].expand(3, 4))
        assert len(draws[name].unique()) == 3
    assert len(draws["u_drop"].unique()) == 12


@pytest.mark.parametrize("batch", [3, 6])
def test_half_a_group_is_an_error(batch):
    family, codes = IMM(), torch.zeros(batch, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="multiple of objective"):
        family.draw(SharedRng(batch), codes, None, Objective(group_size=4))


def test_the_loss_of_a_group_does_not_depend_on_the_batch():
    """What makes ranks and accumulation rounds exact: slices of the draws give slices of the losses."""
    family, model, how = IMM(), model_of(PIXELS), Objective(group_size=2, k=4)
    codes = torch.randint(256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    draws = family.draw(SharedRng(6, torch.Generator().manual_seed(1)), codes, labels_of(6), how)
    whole = family.loss(model, codes, labels_of(6), draws, how)
    part = family.loss(model, codes[2:4], labels_of(6)[2:4], {name: value[2:4] for name, value in draws.items()}, how)
    assert whole.shape == (6,)
    assert whole.isfinite().all()
    assert (whole > 0).all()
    torch.testing.assert_close(part, whole[2:4], rtol=1e-5, atol=0)
    assert torch.equal(whole[0::2], whole[1::2])


def test_student_and_teacher_see_the_same_dropout():
    """At r = t both calls are the same but for the dropped labels: without those the loss vanishes, whatever the
    masks."""
    family, model = IMM(), model_of(PIXELS).train()
    how = Objective(group_size=2, k=1000, min_gap=0, label_drop=0.0)
    codes = torch.randint(256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    draws = family.draw(SharedRng(4, torch.Generator().manual_seed(1)), codes, labels_of(4), how)
    torch.manual_seed(3)
    assert family.loss(model, codes, labels_of(4), draws, how).abs().max() < 1e-9
    state = torch.get_rng_state()
    torch.manual_seed(3)
    first = model(torch.zeros(4, 1, 8, 8), torch.tensor(0.5), torch.tensor(0.1), torch.eye(3)[labels_of(4)])
    assert torch.equal(torch.get_rng_state(), state)  # one pass of masks was used
    assert not torch.equal(
        first, model(torch.zeros(4, 1, 8, 8), torch.tensor(0.5), torch.tensor(0.1), torch.eye(3)[labels_of(4)])
    )


def test_stored_images_and_stored_codes_train_alike():
    """S of a pixel model as codes is what it is as uint8 images, up to the rounding."""
    family, model, how = IMM(), model_of(PIXELS), Objective(group_size=2, k=4)
    codes = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    draws = family.draw(SharedRng(4, torch.Generator().manual_seed(1)), codes, labels_of(4), how)
    images = to_uint8(family.decode(codes), "round")
    from_codes = family.loss(model, codes, labels_of(4), draws, how)
    from_images = family.loss(model, family.encode(images), labels_of(4), draws, how)
    torch.testing.assert_close(from_images, from_codes, rtol=0.05, atol=0)


def test_latent_models_train_on_moments_with_one_draw_per_step(vae_folder):
    family, model, how = IMM(), model_of(LATENTS), Objective(group_size=2, k=4)
    family.open(vae_folder, CPU)
    images = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    moments = family.encode(images)
    assert moments.shape == (4, 8, 4, 4)
    draws = family.draw(SharedRng(4, torch.Generator().manual_seed(1)), moments, labels_of(4), how)
    assert draws["noise"].shape == draws["latent"].shape == (4, 4, 4, 4)
    mean, std = moments.chunk(2, dim=1)
    latents = (mean + std * draws["latent"]) * family.encoder.scale + family.encoder.bias
    with_moments = family.loss(model, moments, labels_of(4), draws, how)
    without = {name: value for name, value in draws.items() if name != "latent"}
    torch.testing.assert_close(with_moments, family.loss(model, latents, labels_of(4), without, how))
    on_latents = family.draw(SharedRng(4, torch.Generator().manual_seed(1)), latents, labels_of(4), how)
    assert all(torch.equal(on_latents[name], draws[name]) for name in without)


def test_decoding_keeps_no_graph_for_gradients(vae_folder):
    """It would hold every activation of the autoencoder in memory."""
    family = IMM()
    family.open(vae_folder, CPU)
    assert not family.decode(torch.zeros(1, 4, 4, 4, requires_grad=True)).requires_grad


def test_latents_without_an_autoencoder_name_what_is_missing():
    with pytest.raises(ValueError, match="autoencoder"):
        IMM().decode(torch.zeros(1, 4, 4, 4))


@torch.no_grad()
def test_autoencoder_is_read_from_a_folder_a_file_and_legacy_names(vae_folder):
    images = torch.randint(256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    encoder = read_autoencoder(vae_folder)
    expected = encoder.decode(encoder.encode_pixels(images)[:, :4])
    arch, current = encoder.vae.arch, to_diffusers(encoder.vae.state_dict(), encoder.vae.arch)
    legacy_names = dict(
        zip(diffusers_names(arch).values(), diffusers_names(arch, LEGACY_ATTENTION).values(), strict=True)
    )
    old = vae_folder / "old"
    old.mkdir()
    torch.save({legacy_names[name]: value for name, value in current.items()}, old / "diffusion_pytorch_model.bin")
    (old / "config.json").write_text(json.dumps(VAE))
    for path in (vae_folder / "diffusion_pytorch_model.safetensors", old):
        other = read_autoencoder(path)
        assert torch.equal(other.decode(other.encode_pixels(images)[:, :4]), expected)


def test_a_folder_without_an_autoencoder_names_the_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors"):
        read_autoencoder(tmp_path)


def test_an_autoencoder_of_another_size_is_an_error(vae_folder):
    (vae_folder / "config.json").write_text(json.dumps({**VAE, "layers_per_block": 2}))
    with pytest.raises(ValueError, match="does not fit"):
        read_autoencoder(vae_folder)


@pytest.mark.parametrize("arch", [PIXELS, LATENTS])
def test_written_weights_are_read_and_sample_the_same(arch, tmp_path):
    family, model = IMM(), model_of(arch)
    path = tmp_path / "ours.safetensors"
    checkpoint.write(path, model.state_dict(), metadata={"family": "imm", "arch": arch, "weights": "ema"})
    again = family.load(checkpoint.read(path)).eval()
    how = Sampling(num_steps=2, cfg_scale=2.0)
    before, after = (family.sample(net, image_rng(0, range(2), "cpu"), labels_of(2), how)[0] for net in (model, again))
    assert torch.equal(before, after)


def test_tensors_alone_do_not_say_which_network_they_are(tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(model_of(LATENTS).state_dict(), path)
    with pytest.raises(ValueError, match="does not say how its network is built"):
        IMM().load(checkpoint.read(path))


class RunsCode:
    def __reduce__(self):
        return (__import__("os").system, ("true",))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    path = tmp_path / "network-snapshot-000001.pkl"
    path.write_bytes(pickle.dumps({"ema": RunsCode()}))
    with pytest.raises(ValueError, match="system"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    "wrong", [{"num_steps": 0}, {"grid": "karras"}, {"mid_nt": (1.0,)}, {"grid": "explicit", "mid_nt": (1.0,)}]
)
def test_sampling_options_are_checked(wrong):
    with pytest.raises(ValueError, match=r"num_steps|grid|mid_nt"):
        Sampling(**wrong)


def test_another_preconditioner_is_an_error():
    with pytest.raises(ValueError, match="EDMPrecond"):
        IMM().build({**PIXELS, "class_name": "EDMPrecond"})
