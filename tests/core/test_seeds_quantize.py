"""Per-image randomness and the rounding rules, against their definitions."""

import pytest
import torch

from neon.quantize import RULES, to_uint8
from neon.seeds import ImageRng, SharedRng, derived_seed, image_rng


def test_an_images_draws_do_not_depend_on_its_batch_mates():
    whole = ImageRng([5, 6, 7])
    alone = ImageRng([6])
    for draw in (
        lambda r: r.normal((2, 3)),
        lambda r: r.uniform((4,), torch.float64),
        lambda r: r.integers(10),
        lambda r: r.exponential((3,)),
    ):
        assert torch.equal(draw(whole)[1:2], draw(alone))


def test_seeds_are_taken_modulo_two_to_the_32():
    assert torch.equal(ImageRng([3]).normal((4,)), ImageRng([3 + (1 << 32)]).normal((4,)))
    assert torch.equal(image_rng(100, [7, 3], "cpu").normal((2,)), ImageRng([107, 103]).normal((2,)))


def test_stream_is_torchs_own():
    g = torch.Generator().manual_seed(9)
    expected = (
        torch.randn(3, generator=g),
        torch.randint(10, (), generator=g),
        torch.randn(2, generator=g, dtype=torch.float64),
    )
    rng = ImageRng([9])
    assert torch.equal(rng.normal((3,))[0], expected[0])
    assert torch.equal(rng.integers(10)[0], expected[1])
    assert torch.equal(rng.normal((2,), torch.float64)[0], expected[2])


def test_shared_rng_is_one_stream_for_the_batch():
    expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(4))
    assert torch.equal(SharedRng(2, torch.Generator().manual_seed(4)).normal((3,)), expected)


def test_categorical_follows_the_probabilities_and_never_picks_the_impossible():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0]).expand(200, 100, 6)
    counts = torch.bincount(ImageRng(range(200)).categorical(probs).flatten(), minlength=6) / 20_000
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    torch.testing.assert_close(counts[[1, 3, 4]], torch.tensor([0.5, 0.2, 0.3]), atol=0.015, rtol=0)


def test_derived_seeds_differ_and_repeat():
    assert derived_seed(0, "a", 1) == derived_seed(0, "a", 1)
    assert (
        len({derived_seed(0, "a", 1), derived_seed(0, "a", 2), derived_seed(1, "a", 1), derived_seed(0, "b", 1)}) == 4
    )


def test_rules_at_their_borders():
    x = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 1.5])
    assert to_uint8(x, "edm").tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(x, "truncate").tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(x, "round").tolist() == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize("rule", RULES)
def test_bytes_survive_a_round_trip(rule):
    """Up to one level under truncation, where x 255 / 2 may fall just short of a whole number."""
    levels = torch.arange(256)
    again = to_uint8(levels / 127.5 - 1, rule).long()
    assert (again - levels).abs().max() <= (1 if rule == "truncate" else 0)


def test_mean_darkening_of_each_rule():
    x = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.9 - 0.95
    exact = (x + 1) * 127.5
    for rule, darkening in (("edm", 0.0), ("truncate", -0.5), ("round", 0.0)):
        assert (to_uint8(x, rule).double() - exact).mean().item() == pytest.approx(darkening, abs=0.01)


def test_bad_input():
    with pytest.raises(ValueError, match="unknown uint8 rule 'floor'"):
        to_uint8(torch.zeros(1), "floor")
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([float("nan")]), "round")
