"""Multi-scale quantisation against brute force, and against itself by another route."""

import pytest
import torch

from var.quantizer import MultiScaleQuantizer, phi_index

PATCH_NUMS = (1, 2, 3, 5)


def quantizer(**options) -> MultiScaleQuantizer:
    torch.manual_seed(0)
    made = MultiScaleQuantizer(**{"vocab_size": 11, "z_channels": 4, "patch_nums": PATCH_NUMS, **options})
    torch.nn.init.normal_(made.embedding.weight)
    return made.requires_grad_(False)


def features(batch: int = 3, side: int = PATCH_NUMS[-1]) -> torch.Tensor:
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("num_phis", "table"),
    [
        (4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),  # the published network; scales 2 and 7 are ties in exact arithmetic
        (4, [0, 1, 2, 3]),
        (4, [0, 1, 2, 2, 3]),
        (4, [0, 0, 1, 2, 2, 3, 3]),
        (4, [0, 2, 3]),
        (4, [0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (4, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]),
        (3, [0, 0, 1, 2]),
        (1, [0, 0, 0]),
    ],
)
def test_which_phi_serves_which_scale(num_phis, table):
    assert [phi_index(scale, len(table), num_phis) for scale in range(len(table))] == table


def test_nearest_code_by_distance_and_by_cosine():
    tokens = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    by_distance, by_cosine = quantizer(), quantizer(is_cosine=True)
    codes = by_distance.embedding.weight
    assert torch.equal(by_distance.nearest(tokens), torch.cdist(tokens.double(), codes.double()).argmin(1))
    similarity = torch.cosine_similarity(tokens[:, None].double(), codes[None].double(), dim=2)
    assert torch.equal(by_cosine.nearest(tokens), similarity.argmax(1))
    assert not torch.equal(by_cosine.nearest(tokens), by_distance.nearest(tokens))


def test_the_first_of_equal_codes_is_chosen():
    made = quantizer()
    made.embedding.weight[7] = made.embedding.weight[2]
    assert made.nearest(made.embedding.weight[[7]]).item() == 2


def test_indices_alone_give_the_features_that_encoding_arrived_at():
    made = quantizer()
    scales = list(made.scales(features()))
    assert [indices.shape for indices, _ in scales] == [(3, side**2) for side in PATCH_NUMS]
    torch.testing.assert_close(made.features_of([indices for indices, _ in scales]), scales[-1][1], atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, (b, _) in zip(made.indices_of(features()), scales, strict=True))


def test_indices_do_not_depend_on_the_batch():
    made = quantizer()
    together = made.indices_of(features())
    for i in range(3):
        alone = made.indices_of(features()[i : i + 1])
        assert all(torch.equal(one, every[i : i + 1]) for one, every in zip(alone, together, strict=True))


def test_teacher_input_is_what_sampling_would_have_fed():
    made = quantizer()
    indices = made.indices_of(features())
    f_hat, fed = made.empty(3), []
    for scale, index in enumerate(indices[:-1]):
        f_hat = made.add_scale(f_hat, made.embed(index), scale)
        fed.append(made.input_of_scale(f_hat, scale + 1))
    assert torch.equal(made.teacher_input(indices), torch.cat(fed, dim=1))
    indices[-1] = torch.zeros_like(indices[-1])  # the last scale is never an input
    assert torch.equal(made.teacher_input(indices), torch.cat(fed, dim=1))


def test_a_code_on_the_last_scale_stays_where_it_is():
    """With phi = identity the last scale adds its codes as they are, row by row."""
    made = quantizer(quant_resi=0)
    codes = torch.arange(25.0)[None, :, None].expand(1, 25, 4)
    added = made.add_scale(made.empty(1), codes, 3)
    assert torch.equal(added[0, 0], torch.arange(25.0).view(5, 5))


def test_other_scales_at_call_time():
    made = quantizer()
    f = features(side=6)
    assert [indices.shape[1] for indices in made.indices_of(f, (1, 4, 6))] == [1, 16, 36]
    with pytest.raises(ValueError, match=r"last scale of patch_nums .* is 5, but the features are 6x6"):
        made.indices_of(f)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"share_quant_resi": 4}, [f"quant_resi.qresi_ls.{i}" for i in range(4)]),
        ({"share_quant_resi": 2}, [f"quant_resi.qresi_ls.{i}" for i in range(2)]),
        ({"share_quant_resi": 1}, ["quant_resi.qresi"]),
        ({"share_quant_resi": 0}, [f"quant_resi.{i}" for i in range(4)]),
        ({"quant_resi": 0.0}, []),
    ],
)
def test_published_names_of_phi(options, names):
    found = [name for name, _ in quantizer(**options).named_parameters() if name.startswith("quant_resi")]
    assert found == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def test_the_ratio_counts_by_its_size():
    negative, positive = quantizer(quant_resi=-0.25), quantizer(quant_resi=0.25)
    assert torch.equal(
        negative.features_of(positive.indices_of(features())), positive.features_of(positive.indices_of(features()))
    )


def test_one_scale_is_refused():
    with pytest.raises(ValueError, match="at least two scales"):
        quantizer(patch_nums=(4,))
