"""The sampler against the teacher-forced network, closed forms and invariances."""

import pytest
import torch

from neon.seeds import ImageRng, SharedRng
from var.options import Sampling
from var.quantizer import MultiScaleQuantizer
from var.sampler import guide, gumbel_softmax, keep_likely, sample_scales
from var.transformer import Transformer, VARArch

PATCH_NUMS = (1, 2, 3)


@pytest.fixture(params=[False, True], ids=["plain", "shared_aln"])
def networks(request):
    torch.manual_seed(0)
    arch = VARArch(
        depth=3,
        embed_dim=32,
        heads=2,
        patch_nums=PATCH_NUMS,
        num_classes=5,
        vocabulary=24,
        code_width=6,
        shared_aln=request.param,
        drop_path=0.5,
    )
    model = Transformer(arch).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the initial weights hardly depend on their inputs
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model, MultiScaleQuantizer(vocab_size=24, z_channels=6, patch_nums=PATCH_NUMS).requires_grad_(False)


def tokens_of(scales):
    return torch.cat([scale.indices for scale in scales], dim=1)


def test_remembered_keys_give_the_logits_of_the_whole_sequence(networks):
    model, quantizer = networks
    labels = torch.tensor([3, 0, 5])  # 5 is "no class"
    scales = list(sample_scales(model, quantizer, ImageRng([1, 2, 3]), labels, Sampling(cfg_scale=2.0, top_k=10)))
    features = quantizer.teacher_input([scale.indices for scale in scales])
    with torch.no_grad():
        conditional, unconditional = model(labels, features), model(torch.full_like(labels, 5), features)
    start = 0
    for level, scale in enumerate(scales):
        part = slice(start, start + scale.indices.shape[1])
        weight = 2.0 * level / 2
        expected = (1 + weight) * conditional[:, part] - weight * unconditional[:, part]
        torch.testing.assert_close(scale.logits, expected, atol=2e-5, rtol=0)
        start = part.stop
    assert (conditional - unconditional)[:2].abs().max() > 1e-2  # guidance has something to do


def test_tokens_do_not_depend_on_batch_or_order(networks):
    model, quantizer = networks
    seeds, labels = [7, 8, 9, 10], torch.tensor([0, 1, 2, 3])
    how = Sampling(cfg_scale=1.5, top_k=12, top_p=0.9)
    together = tokens_of(sample_scales(model, quantizer, ImageRng(seeds), labels, how))
    for i in (3, 1):
        alone = tokens_of(sample_scales(model, quantizer, ImageRng(seeds[i : i + 1]), labels[i : i + 1], how))
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(together[0], together[1])


def test_no_guidance_needs_no_second_half(networks):
    model, quantizer = networks
    batches = []
    model.blocks[0].register_forward_hook(lambda _m, inputs, _o: batches.append(len(inputs[0])))
    labels = torch.tensor([1, 2])
    without = tokens_of(sample_scales(model, quantizer, ImageRng([0, 1]), labels, Sampling(cfg_scale=0.0)))
    assert set(batches) == {2}
    nearly = tokens_of(sample_scales(model, quantizer, ImageRng([0, 1]), labels, Sampling(cfg_scale=1e-7)))
    assert set(batches) == {2, 4}
    assert torch.equal(without, nearly)


def test_memory_holds_the_compute_dtype_and_not_the_last_scale(networks):
    model, quantizer = networks
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        conditioning = model.conditioning(torch.tensor([0]))
        memory = model.sampling_memory(1)
        model.next_logits(model.first_tokens(conditioning), conditioning.blocks, conditioning.head, memory, 0)
        assert memory.tensor.dtype == torch.bfloat16
        assert memory.tensor.shape == (len(model.blocks), 2, 1, 2, 1 + 4, 16)
        scales = list(sample_scales(model, quantizer, ImageRng([0]), torch.tensor([0]), Sampling()))
    assert all(scale.f_hat.dtype == torch.float32 for scale in scales)


def test_autocast_is_the_callers_between_scales(networks):
    model, quantizer = networks
    with torch.autocast("cpu", torch.bfloat16):
        for _ in sample_scales(model, quantizer, ImageRng([0]), torch.tensor([0]), Sampling()):
            assert torch.is_autocast_enabled("cpu")


def test_guidance_formula():
    logits = torch.tensor([[[2.0, 1.0]], [[0.5, 3.0]]])
    assert torch.equal(guide(logits, 0.0), logits[:1])
    assert torch.equal(guide(logits, 2.0), torch.tensor([[[3 * 2 - 2 * 0.5, 3 * 1 - 2 * 3.0]]]))


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()[None, None]

    def kept(top_k, top_p):
        return keep_likely(logits, top_k=top_k, top_p=top_p).isfinite()[0, 0].tolist()

    assert kept(0, 0.0) == [True, True, True, True]
    assert kept(1, 0.0) == [True, False, False, False]
    assert kept(2, 0.0) == [True, True, True, False]  # ties with the k-th stay
    assert kept(0, 0.85) == [True, True, True, False]
    assert kept(0, 0.3) == [True, False, False, False]
    assert kept(0, 1e-6) == [True, False, False, False]  # never nothing
    assert kept(3, 0.99) == [True, True, True, False]


def test_draws_follow_the_filtered_distribution():
    probs = torch.tensor([0.6, 0.0, 0.3, 0.1]).expand(1, 40_000, 4)
    for rng in (ImageRng([3]), SharedRng(1, torch.Generator().manual_seed(3))):
        shares = torch.bincount(rng.categorical(probs).flatten(), minlength=4) / 40_000
        assert shares[1] == 0
        assert (shares - probs[0, 0]).abs().max() < 5 * (0.25 / 40_000) ** 0.5


def test_cold_gumbel_softmax_draws_from_the_softmax():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(1, 40_000, 3)
    weights = gumbel_softmax(logits, 1e-4, ImageRng([5]))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 40_000))
    assert (weights.mean((0, 1)) - torch.tensor([0.6, 0.3, 0.1])).abs().max() < 5 * (0.25 / 40_000) ** 0.5


def test_more_smooth_gives_averaged_codes(networks):
    model, quantizer = networks
    labels = torch.tensor([1, 1])
    how = Sampling(cfg_scale=1.0, top_k=5, more_smooth=True)
    scales = list(sample_scales(model, quantizer, ImageRng([0, 1]), labels, how))
    first, codebook = scales[0].codes[0, 0], quantizer.embedding.weight
    assert not torch.isclose(codebook, first, atol=1e-3).all(1).any()  # at the first scale, temperature 0.27
    again = list(sample_scales(model, quantizer, ImageRng([0, 1]), labels, how))
    assert torch.equal(scales[-1].f_hat, again[-1].f_hat)


@pytest.mark.parametrize(("option", "value"), [("cfg_scale", -1.0), ("top_k", -3), ("top_p", 1.5)])
def test_wrong_options_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        Sampling(**{option: value})


def test_temperature_divides_the_logits_before_anything_is_left_out(networks):
    """Towards 0 every token is the likeliest one; at T the draws are those of a network with logits / T."""
    model, quantizer = networks
    labels = torch.tensor([3, 0])
    cold = Sampling(cfg_scale=0.0, top_k=0, top_p=0.0, temperature=1e-6)
    for scale in sample_scales(model, quantizer, ImageRng([1, 2]), labels, cold):
        assert torch.equal(scale.indices, scale.logits.argmax(-1))
    warm = Sampling(cfg_scale=0.0, top_k=5, top_p=0.9, temperature=2.0)
    first = next(iter(sample_scales(model, quantizer, ImageRng([1, 2]), labels, warm)))
    plain = next(iter(sample_scales(model, quantizer, ImageRng([1, 2]), labels, Sampling(cfg_scale=0.0))))
    torch.testing.assert_close(first.logits, plain.logits / 2, rtol=1e-6, atol=0)
    likely = keep_likely(plain.logits / 2, top_k=5, top_p=0.9)
    assert torch.equal(first.indices, ImageRng([1, 2]).categorical(likely.softmax(-1)))
