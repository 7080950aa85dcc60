"""Precision, recall, density and coverage against cases that can be told by eye, and against brute force."""

import pytest
import torch

from fid.precision_recall import precision_recall


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mode_collapse_is_precise_and_forgets():
    found = precision_recall(generated=0.05 * normal(200, 6), reference=normal(400, 6, seed=1), k=3)
    assert found.precision > 0.95
    assert found.recall < 0.05
    assert found.coverage < 0.5


def test_too_much_variety_recalls_and_is_imprecise():
    found = precision_recall(generated=20 * normal(400, 6), reference=normal(200, 6, seed=1), k=3)
    assert found.recall > 0.95
    assert found.precision < 0.05


def test_identical_sets():
    """Every point is its own centre; on average k + 1 balls (its own and about k others) hold it, strictly k of them
    per ball."""
    x = normal(300, 5)
    found = precision_recall(generated=x, reference=x.clone(), k=3)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == 1  # a ball holds its centre and the k - 1 nearest strictly inside: k per ball, over k


def test_far_apart():
    assert precision_recall(generated=normal(50, 3) + 100, reference=normal(60, 3, seed=1), k=5) == (0, 0, 0, 0)


def test_points_on_a_line():
    """reference 0, 1, 3 (k = 1: radii 1, 1, 2), generated 1.5, 4, 9 (radii 2.5, 2.5, 5)."""
    reference, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[1.5], [4.0], [9.0]])
    found = precision_recall(generated=generated, reference=reference, k=1)
    assert found.precision == pytest.approx(2 / 3)  # 1.5 lies in the ball of 1, 4 in that of 3, 9 in none
    assert found.recall == pytest.approx(1)  # 0, 1, 3 lie within 2.5 of 1.5
    assert found.density == pytest.approx(3 / 3)  # 1.5 in the balls of 1 and 3, 4 in that of 3
    assert found.coverage == pytest.approx(2 / 3)  # the ball of 0 holds nothing: 1.5 is farther than 1


def test_the_boundary():
    """reference 0, 1 (radii 1), generated 2, 3 (radii 1): 2 is exactly on the sphere of 1, and 1 on the sphere of 2."""
    reference, generated = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    assert precision_recall(generated=generated, reference=reference, k=1)[:2] == (0.5, 0.5)
    assert precision_recall(generated=generated, reference=reference, k=1, boundary="outside")[:2] == (0, 0)
    assert precision_recall(generated=generated, reference=reference, k=1)[2:] == (0, 0)


def test_copies_of_one_sample_are_at_distance_zero():
    point = 7 + normal(1, 512)
    found = precision_recall(generated=point.repeat(40, 1), reference=normal(60, 512, seed=1), k=5)
    assert found.precision == 0
    both = precision_recall(generated=point.repeat(40, 1), reference=point.repeat(30, 1), k=5)
    assert (both.precision, both.recall) == (1, 1)
    assert (both.density, both.coverage) == (0, 0)  # strictly inside a ball of radius 0 lies nothing


def brute_force(generated: torch.Tensor, reference: torch.Tensor, k: int) -> list[float]:
    def distances(a, b):
        return (a.double()[:, None] - b.double()[None]).norm(dim=2)

    radius_g, radius_r = (distances(x, x).sort(1).values[:, k] for x in (generated, reference))
    cross = distances(reference, generated)
    return [
        (cross <= radius_r[:, None]).any(0).double().mean().item(),
        (cross <= radius_g[None]).any(1).double().mean().item(),
        (cross < radius_r[:, None]).sum().item() / (k * len(generated)),
        (cross.min(1).values < radius_r).double().mean().item(),
    ]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_brute_force_in_any_number_of_blocks(k):
    generated, reference = 1.2 * normal(700, 16), normal(500, 16, seed=1)
    want = brute_force(generated, reference, k)
    assert list(precision_recall(generated=generated, reference=reference, k=k)) == pytest.approx(want, abs=1e-12)
    for budget_mib in (1, 3):  # blocks of 177 and of 309 points
        assert list(
            precision_recall(generated=generated, reference=reference, k=k, budget_mib=budget_mib)
        ) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("budget_mib", [1, 1024])
@pytest.mark.parametrize("case", ["far from the origin", "an outlier", "lattice", "copies", "huge", "tiny", "float64"])
def test_equals_brute_force_where_float32_cannot_tell(case, budget_mib):
    generated, reference = 1.2 * normal(300, 24), normal(280, 24, seed=1)
    if case == "far from the origin":  # and the origin itself among the points: centring alone does not help
        generated, reference = 3000 + 0.01 * generated, 3000 + 0.01 * reference
        generated[0] = 0
    elif case == "an outlier":
        reference[5] *= 1e4
    elif case == "lattice":  # many distances are exactly equal
        generated, reference = generated[:, :3].round(), reference[:, :3].round()
    elif case == "copies":
        generated[50:], reference[100:] = generated[0], generated[0]
    elif case == "huge":
        generated, reference = generated * 1e25, reference * 1e25  # whose squares are no float32
    elif case == "tiny":
        generated, reference = generated * 1e-25, reference * 1e-25
    else:  # float32 would make all points one
        generated, reference = 1 + 1e-9 * generated.double(), 1 + 1e-9 * reference.double()
    want = brute_force(generated, reference, 3)
    found = precision_recall(generated=generated, reference=reference, k=3, budget_mib=budget_mib)
    assert list(found) == pytest.approx(want, abs=1e-12)


def test_swapping_the_sets_swaps_precision_and_recall():
    a, b = 1.3 * normal(300, 8), normal(200, 8, seed=1)
    one, two = precision_recall(generated=a, reference=b, k=3), precision_recall(generated=b, reference=a, k=3)
    assert one.precision == two.recall != one.recall == two.precision


def test_errors():
    with pytest.raises(ValueError, match="finite"):
        precision_recall(generated=normal(9, 2) / 0, reference=normal(9, 2), k=3)
    with pytest.raises(ValueError, match="at least 4 points in each set, got 3 and 9"):
        precision_recall(generated=normal(3, 2), reference=normal(9, 2), k=3)
    with pytest.raises(ValueError, match="2 dimensions, the reference's 3"):
        precision_recall(generated=normal(9, 2), reference=normal(9, 3), k=3)
    with pytest.raises(ValueError, match="too small"):
        precision_recall(generated=normal(9, 2), reference=normal(9, 2), k=3, budget_mib=0)
