"""The shared convolutional autoencoder, its losses and its training."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from neon.checkpoints import checkpoint
from neon.family import resolve
from neon.images.formats import open_images
from neon.networks.autoencoder import (
    Attention,
    ConvArch,
    Downsample,
    kl_to_unit_normal,
    mean_and_std,
    sample_posterior,
)
from neon.pipeline import train_autoencoder as train_autoencoder_module
from neon.pipeline.experiment import Experiment, parse
from neon.pipeline.train_autoencoder import psnr_db, split, squared_error, train_autoencoder
from neon.runtime.distributed import World
from neon.seeds import SharedRng
from neon.store import records
from neon.training import loop
from xar.trainable_autoencoder import TrainableKL16

SMALL = {"ch": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 3, "image_channels": 1, "num_groups": 2}
ARCHS = {"var": {**SMALL, "patch_nums": [1, 2, 4], "vocab_size": 16}, "xar": {**SMALL, "encoder_attn_resolutions": []}}


def arch(**options) -> ConvArch:
    return ConvArch(**{"ch": 4, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 3, "num_groups": 2, **options})


@torch.no_grad()
def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    separate, fused = Attention(8, arch()), Attention(8, arch(has_fused_qkv=True))
    for part in ("norm", "proj_out"):
        getattr(fused, part).load_state_dict(getattr(separate, part).state_dict())
    fused.qkv.weight.copy_(torch.cat([separate.q.weight, separate.k.weight, separate.v.weight]))
    fused.qkv.bias.copy_(torch.cat([separate.q.bias, separate.k.bias, separate.v.bias]))
    x = torch.randn(2, 8, 3, 5)
    q, k, v = (part(separate.norm(x)).flatten(2) for part in (separate.q, separate.k, separate.v))  # (B, C, N)
    weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(8)).softmax(-1)
    expected = x + separate.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))
    torch.testing.assert_close(separate(x), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(fused(x), expected, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_keeps_the_layout_of_its_input(batch, layout):
    """Or everything after it would be computed, and rounded, in another one than sampling.channels_last says."""
    attention = Attention(64, arch(ch=64, has_fused_qkv=True)).to(memory_format=layout)
    x = torch.randn(batch, 64, 16, 16).to(memory_format=layout)
    assert attention(x).is_contiguous(memory_format=layout)


@torch.no_grad()
def test_downsampling_pads_right_and_bottom():
    down = Downsample(1)
    down.conv.bias.zero_()
    down.conv.weight.zero_()[0, 0, 0, 0] = 1  # picks the upper left pixel of its window
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(x), x[:, :, ::2, ::2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ch": 3}, "must be a multiple of 2"),
        ({"encoder_attention": (2,)}, "level 2"),
        ({"decoder_attention": (-1,)}, "level -1"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        arch(**options)


def test_posterior_against_torch_distributions():
    moments = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, logvar = moments[:, :3], moments[:, 3:]
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    divergence = torch.distributions.kl_divergence(
        posterior, torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    ).sum((1, 2, 3))
    torch.testing.assert_close(kl_to_unit_normal(moments), divergence)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(
        posterior.cdf(sample_posterior(moments, noise)), torch.distributions.Normal(0.0, 1.0).cdf(noise)
    )
    assert mean_and_std(torch.tensor([0.0, 99.0]).view(1, 2, 1, 1))[1].item() == pytest.approx(math.exp(10))


def small(family: str, images: torch.Tensor) -> tuple:
    """(trainable autoencoder, a network, its draws for these images)"""
    trainable = resolve(family).trainable_autoencoder
    torch.manual_seed(0)
    model = trainable.build(ARCHS[family])
    return (
        trainable,
        model,
        trainable.draw(SharedRng(len(images), torch.Generator().manual_seed(3)), images, None, trainable.objective()),
    )


def random_images(batch: int = 4) -> torch.Tensor:
    return torch.randint(256, (batch, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("family", ARCHS)
def test_the_loss_of_an_image_does_not_depend_on_its_batch(family):
    images = random_images()
    trainable, model, draws = small(family, images)
    how = trainable.objective()
    together = trainable.loss(model, images, None, draws, how)
    apart = [
        trainable.loss(model, images[i : i + 1], None, {k: v[i : i + 1] for k, v in draws.items()}, how)
        for i in range(4)
    ]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_kl_loss_by_its_parts():
    images = random_images()
    trainable, model, draws = small("xar", images)
    moments = model.encode(images / 127.5 - 1)
    kl = kl_to_unit_normal(moments)
    plain, pulled = (trainable.loss(model, images, None, draws, trainable.objective(kl_weight=w)) for w in (0.0, 0.5))
    torch.testing.assert_close(pulled - plain, 0.5 * kl / 64, atol=1e-5, rtol=1e-5)
    latents = [
        sample_posterior(m[None], torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(int(s))))
        for m, s in zip(moments, draws["noise_seed"], strict=True)
    ]
    errors = (model.decode(torch.cat(latents)) - (images / 127.5 - 1)).abs().mean((1, 2, 3))
    torch.testing.assert_close(plain, errors, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_latent_scale_makes_unit_variance():
    images = random_images(64)
    trainable, model, _ = small("xar", images)
    model.quant_conv.bias[3:] = 1.0  # a posterior wide enough to count
    arch = trainable.calibrated(model, images, ARCHS["xar"])
    moments = model.encode(images / 127.5 - 1)
    many = torch.cat([sample_posterior(moments, torch.randn(moments[:, :3].shape)) for _ in range(50)])
    assert (many * arch["latent_scale"]).std().item() == pytest.approx(1, abs=0.02)
    assert {key: arch[key] for key in ARCHS["xar"]} == ARCHS["xar"]


def test_vq_loss_by_its_parts_and_where_its_gradients_go():
    images = random_images()
    trainable, model, draws = small("var", images)
    f = model.encode(images / 127.5 - 1)
    scales = [f_hat for _, f_hat in model.quantize.scales(f)]
    distance = torch.stack([(f - f_hat).square().mean((1, 2, 3)) for f_hat in scales]).mean(0)
    recon = (model.decode_unclipped(scales[-1]) - (images / 127.5 - 1)).abs().mean((1, 2, 3))
    loss = trainable.loss(model, images, None, draws, trainable.objective())
    torch.testing.assert_close(loss, recon + 1.25 * distance, atol=1e-6, rtol=1e-6)

    codebook, encoder = model.quantize.embedding.weight, model.quant_conv.weight
    with_beta, without = (
        torch.autograd.grad(
            trainable.loss(model, images, None, draws, trainable.objective(commitment=b)).sum(), [codebook, encoder]
        )
        for b in (0.25, 0.0)
    )
    # the codebook follows the features only: neither the commitment nor the reconstruction reaches it
    torch.testing.assert_close(with_beta[0], without[0])
    frozen_f = f.detach()
    to_codes = (
        torch.stack([(frozen_f - f_hat).square().mean((1, 2, 3)) for _, f_hat in model.quantize.scales(frozen_f)])
        .mean(0)
        .sum()
    )
    torch.testing.assert_close(without[0], torch.autograd.grad(to_codes, codebook)[0])
    # the encoder gets the decoder's gradient as if f_hat were f
    f_hat = scales[-1].detach().requires_grad_()
    (at_f_hat,) = torch.autograd.grad(
        (model.decode_unclipped(f_hat) - (images / 127.5 - 1)).abs().mean((1, 2, 3)).sum(), f_hat
    )
    torch.testing.assert_close(without[1], torch.autograd.grad(f, encoder, at_f_hat)[0], atol=1e-6, rtol=1e-4)


def test_psnr():
    a = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert psnr_db(squared_error(a, a).item()) == math.inf
    assert psnr_db(squared_error(a, a + 1).item() / a.numel()) == pytest.approx(20 * math.log10(255))
    assert psnr_db(squared_error(a, a + 255).item() / a.numel()) == 0  # no wrap-around of uint8


def halves(folder: Path, *, last_black: bool = False) -> Path:
    """48 images of 8x8, one half of each (upper, lower, left or right) bright."""
    upper = np.zeros((8, 8), np.uint8)
    upper[:4] = 220
    images = np.stack([np.rot90(upper, i) for i in np.random.RandomState(0).randint(4, size=48)])
    if last_black:
        images[-8:] = 0
    path = folder / "halves.npz"
    np.savez(path, images=images)
    return path


def experiment(family: str, data: Path, **recipe) -> Experiment:
    training = {"images": 960, "batch": 16, "lr": 1e-2, **recipe}
    return parse(
        {
            "family": family,
            "data": {"path": str(data)},
            "autoencoder": {"arch": ARCHS[family], "held_out": 8, "train": training},
        }
    )


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.read(path, weights="any").tensors.items()}


@pytest.mark.parametrize("family", ARCHS)
def test_training_learns_and_its_file_reproduces_the_reported_psnr(family, tmp_path):
    data = halves(tmp_path)
    result = train_autoencoder(experiment(family, data), tmp_path / "run", World())
    images = torch.from_numpy(np.load(data)["images"])[:, None]
    mean_image_psnr = psnr_db((images[-8:].float() - images[:-8].float().mean(0)).square().mean().item())
    assert result["psnr_db"] > mean_image_psnr + 8
    json.dumps(result)

    file = checkpoint.read(result["autoencoder"], weights="any")
    trainable = resolve(family).trainable_autoencoder
    model = trainable.build(file.arch)
    file.load_into(model)
    with torch.no_grad():
        found = ((trainable.reconstruct(model, images[-8:]) + 1) * 127.5).round().clamp(0, 255)
    assert psnr_db((found - images[-8:].float()).square().mean().item()) == pytest.approx(result["psnr_db"], abs=1e-4)


def test_held_out_images_have_no_influence(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    results = [
        train_autoencoder(
            experiment("var", halves(tmp_path / name, last_black=name == "b"), images=64),
            tmp_path / name / "run",
            World(),
        )
        for name in ("a", "b")
    ]
    a, b = (weights_of(result["autoencoder"]) for result in results)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert results[0]["psnr_db"] != results[1]["psnr_db"]


def test_the_scale_of_latents_is_measured_on_all_classes_of_a_sorted_set(tmp_path, monkeypatch):
    images = np.zeros((100, 8, 8), np.uint8)
    images[50:92] = 200
    np.savez(tmp_path / "sorted.npz", images=images)
    seen: list[torch.Tensor] = []
    calibrated = TrainableKL16.calibrated
    monkeypatch.setattr(TrainableKL16, "calibrated", lambda *args: (seen.append(args[2]), calibrated(*args))[1])
    monkeypatch.setattr(train_autoencoder_module, "CALIBRATION_IMAGES", 30)
    train_autoencoder(experiment("xar", tmp_path / "sorted.npz", images=16), tmp_path / "run", World())
    (sample,) = seen
    assert len(sample) == 30
    assert 5 < int((sample.amax((1, 2, 3)) == 200).sum()) < 25


@pytest.mark.parametrize("family", ARCHS)
def test_a_killed_training_goes_on_as_if_nothing_had_happened(family, tmp_path, monkeypatch):
    data = halves(tmp_path)
    unbroken = train_autoencoder(experiment(family, data, images=128), tmp_path / "unbroken", World())
    monkeypatch.setattr(records.Saver, "is_due", True)
    step, calls = loop.train_step, []

    def dies_at_the_fifth(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(loop, "train_step", dies_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(experiment(family, data, images=128), tmp_path / "broken", World())
    assert not (tmp_path / "broken" / "autoencoder.safetensors").exists()
    resumed = train_autoencoder(experiment(family, data, images=128), tmp_path / "broken", World())
    assert len(calls) == 5 + 4
    a, b = weights_of(unbroken["autoencoder"]), weights_of(resumed["autoencoder"])
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert resumed["psnr_db"] == unbroken["psnr_db"]


def test_what_cannot_be_trained_is_refused(tmp_path):
    data = halves(tmp_path)
    with pytest.raises(ValueError, match="family 'edm' has no autoencoder"):
        parse({"family": "edm", "autoencoder": {"arch": {}, "train": {"images": 1, "batch": 1, "lr": 1.0}}})
    with pytest.raises(ValueError, match=r"autoencoder.train.* has no key 'imges'"):
        experiment("var", data, imges=3)
    with pytest.raises(ValueError, match="48 images, but 48 are held out"):
        split(open_images(data), 48)
