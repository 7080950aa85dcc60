"""xAR's side of the family protocol: codes, draws, loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neon.seeds import ImageRng, SharedRng
from tests.xar.test_transformer import tiny
from xar import cells
from xar.family import XAR
from xar.loss import velocity_loss
from xar.options import Objective, Sampling
from xar.vae import KL16, KL16Arch


def opened() -> XAR:
    """A family with an untrained autoencoder for 32 x 32 images: 16 channels at half the side."""
    torch.manual_seed(0)
    family = XAR()
    family.use(
        KL16(
            KL16Arch(ch=32, ch_mult=(1, 2), num_res_blocks=1, num_groups=16, resolution=32, encoder_attn_resolutions=())
        )
    )
    return family


def pictures(count: int) -> Tensor:
    return torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def shared(batch: int, seed: int = 0) -> SharedRng:
    return SharedRng(batch, torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_codes_are_the_moments_of_the_image_and_of_its_mirror():
    family, images = opened(), pictures(3)
    codes = family.encode(images)
    assert codes.shape == (3, 2, 32, 16, 16)
    assert torch.equal(codes, family.encode(images))
    pixels = images.double() / 255 * 2 - 1
    torch.testing.assert_close(codes[:, 0], family.autoencoder.encode(pixels.float()), rtol=0, atol=1e-4)
    torch.testing.assert_close(codes[:, 1], family.encode(images.flip(-1))[:, 0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_decode_undoes_the_latent_scale():
    family, latents = opened(), torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(family.decode(latents), family.autoencoder.decode(latents / 0.2325), rtol=0, atol=1e-5)


def test_draws_have_their_distributions():
    family, how, batch = opened(), Objective(label_drop=0.1, flip=0.5), 20_000
    draws = family.draw(shared(batch), torch.empty(batch, 2, 0, 0, 0), None, how)
    assert float(draws["flipped"].float().mean()) == pytest.approx(0.5, abs=0.015)  # four standard errors
    assert float(draws["label_dropped"].float().mean()) == pytest.approx(0.1, abs=0.009)
    assert draws["times"].dtype == torch.float32
    logits = draws["times"].double().logit()
    assert float(logits.mean()) == pytest.approx(0, abs=0.015)
    assert float(logits.std()) == pytest.approx(1, abs=0.01)
    assert abs(float(torch.corrcoef(logits.T)[0, 1])) < 0.03  # every cell has a time of its own
    assert draws["noise"].shape == (batch, 4, 64, 16)
    assert draws["posterior_noise"].shape == (batch, 16, 16, 16)


def test_sampled_latents_are_used_as_they_are():
    family, how, latents = XAR(), Objective(dropout=0.0), torch.randn(4, 16, 16, 16)
    labels, model = torch.tensor([1, 2, 3, 4]), tiny()
    draws = family.draw(shared(4), latents, labels, how)
    assert sorted(draws) == ["label_dropped", "noise", "times"]
    draws["label_dropped"][:] = False
    expected = velocity_loss(model, latents, labels, times=draws["times"], noise=draws["noise"])
    torch.testing.assert_close(family.loss(model, latents, labels, draws, how), expected, rtol=0, atol=0)


@torch.no_grad()
def test_the_flip_chooses_the_moments():
    family, how, model = opened(), Objective(dropout=0.0), tiny()
    codes, labels = family.encode(pictures(2)), torch.tensor([1, 2])
    draws = family.draw(shared(2), codes, labels, how)
    for flipped in (False, True):
        draws["flipped"][:] = flipped
        mean, logvar = codes[:, int(flipped)].chunk(2, dim=1)
        latents = 0.2325 * (mean + (logvar / 2).exp() * draws["posterior_noise"])
        used = torch.where(draws["label_dropped"], 10, labels)
        expected = velocity_loss(model, latents, used, times=draws["times"], noise=draws["noise"])
        torch.testing.assert_close(family.loss(model, codes, labels, draws, how), expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_dropout_belongs_to_training():
    """`neon check` found that the loss of the published recipe draws numbers of its own; diagnoses had no dropout but
    xAR's."""
    family, model, latents, labels = XAR(), tiny(), torch.randn(2, 16, 16, 16), torch.tensor([3, 4])
    draws = family.draw(shared(2), latents, labels, Objective())
    of_the_mode = [
        family.loss(model.train(mode), latents, labels, draws, Objective(dropout=0.1)) for mode in (False, False, True)
    ]
    assert torch.equal(of_the_mode[0], of_the_mode[1])
    assert not torch.allclose(of_the_mode[0], of_the_mode[2])


@torch.no_grad()
def test_dropped_labels_become_the_null_label():
    family, how, model, latents = XAR(), Objective(dropout=0.0), tiny(), torch.randn(2, 16, 16, 16)
    draws = family.draw(shared(2), latents, None, how)
    draws["label_dropped"] = torch.tensor([True, False])
    losses = family.loss(model, latents, torch.tensor([3, 4]), draws, how)
    expected = velocity_loss(model, latents, torch.tensor([10, 4]), times=draws["times"], noise=draws["noise"])
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)


class KnownVelocity(nn.Module):
    """Answers with a constant, and remembers what it was asked."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor, *, dropout: float) -> Tensor:
        self.x, self.timesteps = x, timesteps
        return self.answer


def test_the_loss_is_zero_at_noise_minus_data():
    latents, noise = torch.randn(2, 16, 16, 16), torch.randn(2, 4, 64, 16)
    times = torch.tensor([[0.0, 0.25, 0.9999, 1.0], [0.5, 0.5, 0.5, 0.5]])
    model = KnownVelocity(noise - cells.to_cells(latents))
    losses = velocity_loss(model, latents, torch.tensor([0, 1]), times=times, noise=noise)
    assert losses.tolist() == [0, 0]
    assert model.timesteps.tolist() == [[0, 250, 999, 1000], [500] * 4]
    torch.testing.assert_close(model.x[0, 0], cells.to_cells(latents)[0, 0])  # time 0 is data, time 1 noise
    torch.testing.assert_close(model.x[0, 3], noise[0, 3])
    model.answer = model.answer + torch.tensor([1.0, 3.0])[:, None, None, None]
    torch.testing.assert_close(
        velocity_loss(model, latents, torch.tensor([0, 1]), times=times, noise=noise),
        torch.tensor([1.0, 9.0]),
        rtol=1e-5,
        atol=0,
    )


def test_labels_are_drawn_from_the_image_s_own_stream_if_none_are_given():
    family, how = XAR(), Sampling(num_steps=2)
    latents, labels = family.sample(tiny(), ImageRng(range(6)), None, how)
    again, same = family.sample(tiny(), ImageRng(range(3, 6)), None, how)
    assert labels[3:].tolist() == same.tolist()
    assert len(set(labels.tolist())) > 1
    assert int(labels.max()) < 10
    torch.testing.assert_close(latents[3:], again, rtol=0, atol=1e-5)


def test_weight_decay_spares_vectors_and_biases_only():
    model, family = tiny(), XAR()
    spared = {name for name, parameter in model.named_parameters() if not family.decays(name, parameter)}
    assert "class_emb.weight" not in spared
    assert "encoder_pos_embed_learned" not in spared
    assert {"encoder_norm.weight", "pred.bias", "encoder_blocks.0.attn.qkv.bias"} <= spared
    assert all(name.endswith((".bias", "norm.weight", "_ln.weight")) for name in spared)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(num_steps=1), "num_steps >= 2"),
        (lambda: Sampling(num_steps=0, solver="ode"), "num_steps must be >= 1"),
        (lambda: Objective(label_drop=1.5), r"label_drop must be >= 0 and <= 1"),
        (lambda: XAR().open(None, torch.device("cpu")), "name its autoencoder"),
        (lambda: XAR().decode(torch.zeros(1, 16, 16, 16)), "needs its autoencoder"),
        (lambda: XAR().loss(tiny(), torch.zeros(1, 16, 16, 16), None, {}, Objective()), "class labels"),
    ],
)
def test_wrong_use_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_published_recipe_is_the_default():
    how = Objective()
    assert (how.dropout, how.label_drop, how.flip) == (0.1, 0.1, 0.5)
