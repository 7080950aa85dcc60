"""VAR as a family: what training sees of stored images and tokens, and its random numbers."""

import pytest
import torch

from neon.sampling.generate import Source, generate
from neon.sampling.options import Sampling as SharedSampling
from neon.seeds import ImageRng, SharedRng
from tests import goldens
from var import presets
from var.crops import resized_crops
from var.family import FAMILY, draw_paths
from var.loss import token_loss
from var.options import Objective, Sampling
from var.transformer import Transformer, VARArch
from var.vqvae import VQVAE, VQVAEArch

PATCH_NUMS = (1, 2, 4)
NUM_TOKENS = 21


@pytest.fixture
def family():
    found = FAMILY()
    arch = VQVAEArch(patch_nums=PATCH_NUMS, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8, vocab_size=20)
    found.use(goldens.seed_by_name(VQVAE(arch)))
    return found


@pytest.fixture
def model():
    torch.manual_seed(0)
    arch = VARArch(
        depth=4, embed_dim=32, heads=2, patch_nums=PATCH_NUMS, num_classes=5, vocabulary=20, code_width=8, drop_path=0.6
    )
    network = Transformer(arch)
    with torch.no_grad():
        for parameter in network.parameters():  # the initial gammas are almost 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


LABELS = torch.tensor([0, 1, 2, 3])


def rng(seed=0, batch=4):
    return SharedRng(batch, torch.Generator().manual_seed(seed))


def test_images_and_their_tokens_have_the_same_loss(family, model, images):
    how = Objective(resize=1.0, label_drop=0.3)
    tokens = torch.cat(family.tokeniser(PATCH_NUMS).image_to_indices(images / 127.5 - 1), dim=1)
    draws = family.draw(rng(), images, LABELS, how)
    of_images = family.loss(model, images, LABELS, draws, how)
    token_draws = {name: draws[name] for name in family.draw(rng(), tokens, LABELS, how)}
    of_tokens = family.loss(model, tokens, LABELS, token_draws, how)
    assert torch.equal(of_images, of_tokens)
    assert of_images.shape == (4,)


def test_loss_is_that_of_the_crops(family, model, images):
    how = Objective(flip=0.5)
    model.eval()
    draws = family.draw(rng(3), images, LABELS, how) | {"label_dropped": torch.tensor([True, False, False, True])}
    crops = resized_crops(
        images, shorter=18, side=16, top=draws["top"], left=draws["left"], is_flipped=draws["flipped"]
    )
    tokeniser = family.tokeniser(PATCH_NUMS)
    indices = tokeniser.image_to_indices(crops / 127.5 - 1)
    logits = model(torch.tensor([5, 1, 2, 5]), tokeniser.quantize.teacher_input(indices))
    assert torch.equal(family.loss(model, images, LABELS, draws, how), token_loss(logits, torch.cat(indices, dim=1)))


def test_draws_cover_every_crop_and_flip(family):
    draws = family.draw(
        rng(1, 4000), torch.zeros(4000, 3, 16, 16, dtype=torch.uint8), None, Objective(flip=0.25, label_drop=0.1)
    )
    assert draws["top"].unique().tolist() == draws["left"].unique().tolist() == [0, 1, 2]
    assert draws["flipped"].float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert draws["label_dropped"].float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert len(draws["path_seed"].unique()) > 3990


def test_stochastic_depth_is_each_images_own(model):
    seeds = torch.arange(3000)
    kept = draw_paths(model, seeds)
    assert torch.equal(draw_paths(model, seeds[17:19]), kept[17:19])
    rates = 1 - kept.float().mean((0, 2))
    torch.testing.assert_close(rates, torch.tensor([0.0, 0.2, 0.4, 0.6]), atol=0.03, rtol=0)
    assert not torch.equal(kept[..., 0], kept[..., 1])


def test_stochastic_depth_keeps_the_expected_branch(model):
    """Dropped branches contribute nothing, kept ones are divided by their probability."""
    block = model.stack[2]
    x, six = torch.randn(1, 3, 32), torch.randn(1, 1, 6, 32)

    def attend(queries, keys, values, scale):
        return values

    full = block(x, six, attend)
    assert torch.equal(block(x, six, attend, torch.zeros(1, 2, dtype=torch.bool)), x)
    attention_only = block(x, six, attend, torch.tensor([[True, False]])) - x
    attended = (
        block.attn(torch.nn.functional.layer_norm(x, (32,), eps=1e-6) * (1 + six[:, :, 2]) + six[:, :, 4], attend)
        * six[:, :, 0]
    )
    torch.testing.assert_close(attention_only, attended / (1 - 0.4))
    assert not torch.equal(full, x)


def test_evaluation_mode_drops_no_path(family, model, images):
    how = Objective()
    draws = family.draw(rng(), images, LABELS, how)
    other = draws | {"path_seed": draws["path_seed"] + 1}
    assert not torch.equal(
        family.loss(model, images, LABELS, draws, how), family.loss(model, images, LABELS, other, how)
    )
    model.eval()
    assert torch.equal(family.loss(model, images, LABELS, draws, how), family.loss(model, images, LABELS, other, how))


def test_finer_tokens_do_not_reach_coarser_logits(model):
    model.eval()
    features = torch.randn(2, NUM_TOKENS - 1, 8)
    changed = features.clone()
    changed[:, 4:] += 1  # the last scale's inputs
    with torch.no_grad():
        before, after = model(LABELS[:2], features), model(LABELS[:2], changed)
        short = model(LABELS[:2], features[:, :4])
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])
    torch.testing.assert_close(short, before[:, :5], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="end inside a scale"):
        model(LABELS[:2], features[:, :7])


def test_sampled_tokens_decode_to_the_samplers_features(family, model):
    model.eval()
    codes, labels = family.sample(model, ImageRng([1, 2, 3, 4]), LABELS, Sampling(cfg_scale=1.0))
    assert codes.shape == (4, NUM_TOKENS)
    assert torch.equal(labels, LABELS)
    tokeniser = family.tokeniser()
    expected = tokeniser.indices_to_image(list(codes.split([1, 4, 16], dim=1)))
    assert torch.equal(family.decode(codes), expected)
    smooth, _ = family.sample(model, ImageRng([1, 2]), LABELS[:2], Sampling(cfg_scale=1.0, more_smooth=True))
    assert smooth.shape == (2, 8, 4, 4)
    assert torch.equal(family.decode(smooth), tokeniser.decode(smooth))
    with pytest.raises(ValueError, match="more_smooth"):
        family.draw(rng(batch=2), smooth, None, Objective())


def test_labels_are_drawn_from_the_images_own_stream(family, model):
    _, labels = family.sample(model, ImageRng(range(40)), None, Sampling(cfg_scale=0.0))
    _, last = family.sample(model, ImageRng([39]), None, Sampling(cfg_scale=0.0))
    assert set(labels.tolist()) == {0, 1, 2, 3, 4}
    assert labels[39] == last[0]


def test_mismatched_tokeniser_is_refused(family):
    with pytest.raises(ValueError, match="3 scales, the transformer 2"):
        family.tokeniser((1, 4))
    with pytest.raises(ValueError, match="17 tokens fit neither"):
        family.decode(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"vae_ch160v4096z32\.pth"):
        FAMILY().tokeniser(PATCH_NUMS)
    with pytest.raises(ValueError, match=r"base\.autoencoder"):
        FAMILY().open(None, torch.device("cpu"))


def test_one_tokeniser_serves_both_published_resolutions():
    family = FAMILY()
    arch = VQVAEArch(
        patch_nums=presets.PATCH_NUMS[256], ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, vocab_size=8
    )
    family.use(goldens.seed_by_name(VQVAE(arch)))
    for side, length in ((256, 680), (512, 2240)):
        assert family.decode(torch.zeros(1, length, dtype=torch.int64)).shape[-1] == side // 8


def test_another_memory_format_reaches_the_decoder_and_changes_only_rounding(family, model):
    def images(*, channels_last: bool) -> torch.Tensor:
        sampling = SharedSampling(options=Sampling(cfg_scale=1.5), uint8="round", channels_last=channels_last)
        source = Source(family=family, sampling=sampling, labels="balanced", first_seed=0, num_classes=5)
        (batch,) = generate(source, model, [range(4)], torch.device("cpu"))
        with torch.inference_mode():
            return family.decode(batch.codes)

    plain, other = images(channels_last=False), images(channels_last=True)
    assert family.tokeniser().decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    goldens.assert_close(other, plain, atol=1e-4)
