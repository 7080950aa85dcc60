"""The network against its published layout, and against what cluster-causal attention must and must not see."""

from __future__ import annotations

import pytest
import torch

from tests import goldens
from xar import cells, presets
from xar.load import arch_from_shapes
from xar.transformer import XARArch, XARTransformer

ARCH = XARArch(width=32, num_heads=2, encoder_depth=1, decoder_depth=2, num_classes=10)


def tiny(seed: int = 0) -> XARTransformer:
    torch.manual_seed(seed)
    return XARTransformer(ARCH).eval()


@pytest.mark.parametrize("name", presets.SIZES)
def test_state_dict_is_the_published_one(name):
    with torch.device("meta"):
        model = XARTransformer(presets.SIZES[name])
    assert arch_from_shapes(model.state_dict()) == presets.SIZES[name]
    assert list(goldens.manifest_of(model).items()) == list(goldens.manifest("xar", name).items())


def test_cell_order():
    """index n = 64 c + p is row 8 (c // 2) + p // 8, column 8 (c % 2) + p % 8."""
    expected = [[8 * (c // 2) + p // 8, 8 * (c % 2) + p % 8] for c in range(4) for p in range(64)]
    assert cells.token_positions().tolist() == expected
    latents = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cells.from_cells(cells.to_cells(latents)), latents)
    row, column = expected[64 * 2 + 13]
    assert torch.equal(cells.to_cells(latents)[:, 2, 13], latents[:, :, row, column])


def test_latents_of_another_autoencoder_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 16, 16, 16\), got \(2, 4, 32, 32\)"):
        cells.to_cells(torch.zeros(2, 4, 32, 32))


@torch.no_grad()
def test_a_cell_sees_itself_and_earlier_cells_only():
    model = tiny()
    x = torch.randn(1, 4, 64, 16, generator=torch.Generator().manual_seed(0))
    times, labels = torch.tensor([[100, 400, 600, 900]]), torch.tensor([3])
    before = model(x, times, labels)
    for cell in range(4):
        changed = x.clone()
        changed[:, cell, 17] += 1
        difference = (model(changed, times, labels) - before).abs().amax(dim=(0, 2, 3))
        assert (difference[:cell] == 0).all()
        assert (difference[cell:] > 1e-4).all()
        inside = (model(changed, times, labels) - before)[0, cell].abs().amax(dim=-1)
        assert (inside > 0).all()  # no order among the tokens of a cell


@torch.no_grad()
def test_each_cell_has_its_own_time():
    model = tiny()
    x = torch.randn(1, 4, 64, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3])
    before = model(x, torch.tensor([[100, 400, 600, 900]]), labels)
    later = model(x, torch.tensor([[100, 400, 700, 900]]), labels)
    moved = (later - before).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert moved.tolist() == [False, False, True, True]


@torch.no_grad()
@pytest.mark.parametrize("cell", range(4))
def test_cached_calls_equal_the_training_path(cell):
    """With clean earlier cells at time 0 the two paths compute the same thing."""
    model = tiny()
    x = torch.randn(2, 4, 64, 16, generator=torch.Generator().manual_seed(1))
    labels, timestep = torch.tensor([1, 10]), 730
    cache = model.new_cache(2)
    for earlier in range(cell):
        model(
            torch.randn_like(x[:, :1]), torch.full((2, 1), 900), labels, first_cell=earlier, cache=cache
        )  # is overwritten
        model(x[:, earlier, None], torch.zeros(2, 1, dtype=torch.long), labels, first_cell=earlier, cache=cache)
    stepped = model(x[:, cell, None], torch.full((2, 1), timestep), labels, first_cell=cell, cache=cache)
    times = torch.full((2, 4), 999)
    times[:, :cell], times[:, cell] = 0, timestep
    torch.testing.assert_close(stepped[:, 0], model(x, times, labels)[:, cell], rtol=0, atol=1e-5)


def test_dropout_only_where_it_is_asked_for():
    model = tiny().train()
    x, times, labels = torch.randn(1, 4, 64, 16), torch.full((1, 4), 500), torch.tensor([3])
    assert torch.equal(model(x, times, labels), model(x, times, labels))
    assert not torch.allclose(model(x, times, labels, dropout=0.1), model(x, times, labels, dropout=0.1))


def test_width_must_suit_the_rotary_embedding():
    with pytest.raises(ValueError, match=r"multiple of 4 x num_heads .* got 36, 2"):
        XARArch(width=36, num_heads=2, encoder_depth=1, decoder_depth=1)


def test_another_network_s_tensors_are_named():
    with pytest.raises(ValueError, match="no xAR transformer"):
        arch_from_shapes({"pos_1LC": torch.zeros(1)})
