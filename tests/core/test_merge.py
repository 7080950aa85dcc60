"""The merge against its definition, its fixed points and a memory-lean, resident and file-level form of itself."""

import math
import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from neon.merge import LiveMerge, RandomDirection, difference, merged_entries, reverse_merge, step_size
from neon.merge_files.outputs import output_names


def state(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(5, 7, generator=g).to(dtype), "a.bias": torch.randn(5, generator=g).to(dtype)}


def test_is_the_papers_line():
    base, synth, w = state(0, torch.float64), state(1, torch.float64), 1.5
    for name, merged in reverse_merge(base, synth, w).items():
        torch.testing.assert_close(merged, (1 + w) * base[name] - w * synth[name], atol=1e-14, rtol=0)


def test_sign_by_hand():
    assert reverse_merge({"p": torch.tensor([1.0])}, {"p": torch.tensor([3.0])}, 0.5)["p"].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_fixed_points_bit_for_bit(dtype):
    base, synth = state(0, dtype), state(1, dtype)
    for w, expected in ((0.0, base), (-1.0, synth)):
        merged = reverse_merge(base, synth, w)
        assert all(torch.equal(merged[name], expected[name]) and merged[name].dtype == dtype for name in base)


def test_half_precision_is_rounded_once():
    base, synth = state(0, torch.bfloat16), state(1, torch.bfloat16)
    merged = reverse_merge(base, synth, 0.3)["a.weight"]
    b, s = base["a.weight"].double(), synth["a.weight"].double()
    assert torch.equal(merged, (b - 0.3 * (s - b)).float().bfloat16())
    half = base["a.weight"] - torch.tensor(0.3, dtype=torch.bfloat16) * (synth["a.weight"] - base["a.weight"])
    assert not torch.equal(merged, half)  # arithmetic in bfloat16 is measurably something else


@pytest.mark.parametrize("last", [0.5, float("inf")])
def test_a_stored_float32_is_not_rounded_to_the_bases_dtype_first(last):
    """Also in a tensor whose other entries cannot be extrapolated."""
    base = {"p": torch.tensor([1.0, last], dtype=torch.float16)}
    merged = reverse_merge(base, {"p": torch.tensor([1.0001, 0.25])}, -20.0, on_mismatch="keep_base")["p"]
    assert merged.dtype == torch.float16
    assert merged[0].item() == pytest.approx(
        1.002, abs=2**-11
    )  # 1.0001 in float16 is 1: rounded first, nothing would move


def test_only_parameters_move():
    base, synth = state(0), state(1)
    merged = reverse_merge(base, synth, 2.0, parameters={"a.weight"})
    assert torch.equal(merged["a.bias"], base["a.bias"])
    assert not torch.equal(merged["a.weight"], base["a.weight"])


def test_equal_masks_with_infinities_and_counters_are_copied():
    mask = torch.full((3, 3), float("-inf")).triu(1)
    base = {"p": torch.ones(2), "mask": mask, "count": torch.tensor(3), "empty": torch.zeros(0)}
    synth = {"p": torch.zeros(2), "mask": mask.clone(), "count": torch.tensor(3), "empty": torch.zeros(0)}
    merged = reverse_merge(base, synth, 1.0)
    assert torch.equal(merged["mask"], mask)
    assert merged["count"].dtype == torch.int64
    assert merged["p"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_finite(bad):
    base, synth = {"p": torch.tensor([1.0, 2.0])}, {"p": torch.tensor([3.0, bad])}
    with pytest.raises(ValueError, match=r"p: differs.*not finite"):
        reverse_merge(base, synth, 1.0)
    assert reverse_merge(base, synth, 1.0, on_mismatch="keep_base")["p"].tolist() == [-1.0, 2.0]
    assert (
        reverse_merge({"p": torch.tensor([1.0, bad])}, {"p": torch.tensor([3.0, 4.0])}, 1.0, on_mismatch="keep_base")[
            "p"
        ][0]
        == -1.0
    )


def test_ties_of_half_precision_round_as_w_says():
    """-0.875 - 2.6 * 2.734375 = -7.984375 lies halfway between two bfloat16s; 2.6 as a float32 is a little less."""
    base, synth = torch.tensor([-0.875]).bfloat16(), torch.tensor([1.859375]).bfloat16()
    assert reverse_merge({"p": base}, {"p": synth}, 2.6)["p"].item() == -8.0
    live = nn.ParameterList([nn.Parameter(base.clone())])
    LiveMerge(live, {"0": base}, {"0": synth}).set_w(2.6)
    assert live[0].item() == -8.0


def test_integers_that_differ_are_counters_and_come_from_the_base():
    assert reverse_merge({"n": torch.tensor([1])}, {"n": torch.tensor([2])}, 1.0)["n"].item() == 1
    with pytest.raises(ValueError, match=r"n: differs.*float32 in the base and torch\.int64"):
        reverse_merge({"n": torch.tensor([1.0])}, {"n": torch.tensor([2])}, 1.0)


def test_running_statistics_and_masks_are_the_bases_where_nobody_names_the_parameters():
    def trained(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4))
        model(torch.randn(20, 3) * (1 + seed))
        nn.init.normal_(model[1].weight), nn.init.normal_(model[1].bias)
        model.register_buffer("attn_mask", torch.full((2, 2), -torch.inf).triu(1 + seed))
        model.register_buffer("table", torch.zeros(2).where(torch.tensor([seed == 0, False]), -torch.inf))
        return model

    base, synth = trained(0), trained(1)
    merged = reverse_merge(base.state_dict(), synth.state_dict(), 2.0)
    parameters = {name for name, _ in base.named_parameters()}
    assert len(parameters) == 4
    for name, value in base.state_dict().items():
        assert torch.equal(merged[name], value) == (name not in parameters), name
    weight_norm = {"v.weight_g": torch.ones(1), "v.weight_v": torch.ones(2)}
    moved = reverse_merge(weight_norm, {name: value + 1 for name, value in weight_norm.items()}, 1.0)
    assert moved["v.weight_v"].tolist() == [0, 0]  # weight norm's direction is a parameter


LOOK_LIKE_BUFFERS = {  # name -> (base, self-trained, whether it is learned)
    "learned.mask": ([0.3, -0.2, 0.7], [0.4, -0.2, 0.5], True),
    "lsq.step": ([0.02], [0.03], True),
    "steps": ([1.0, 2.0, 3.0], [1.5, 2.0, 3.0], True),
    "ema.step": (1000.0, 1064.0, False),
    "codes.counter": ([5.0, 7.0, 9.0], [6.0, 8.0, 10.0], False),
    "a.mask": ([0.0, 1.0, 1.0], [0.0, 0.0, 1.0], False),
    "b.mask": ([0.0, -1e9, 0.0], [0.0, -1e9 + 64, 0.0], False),
    "c.causal_mask": ([0.0, -torch.inf], [-torch.inf, 0.0], False),
    "d.mask": ([0.5, 0.25], [0.5, 0.25], False),
    "bn.running_mean": ([0.1, 0.2], [0.3, 0.2], False),
}


@pytest.mark.parametrize("name", LOOK_LIKE_BUFFERS)
def test_what_is_called_as_a_buffer_but_learned_moves(name):
    base, synth, is_learned = LOOK_LIKE_BUFFERS[name]
    states = [{"p": torch.ones(1), name: torch.tensor(value)} for value in (base, synth)]
    expected = states[0][name] - 2 * (states[1][name] - states[0][name]) if is_learned else states[0][name]
    torch.testing.assert_close(reverse_merge(*states, 2.0)[name], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_computed_as_float32(dtype):
    base, synth = torch.tensor([1.0, 2.0, -0.5]).to(dtype), torch.tensor([2.0, 2.0, -1.0]).to(dtype)
    assert reverse_merge({"p": base}, {"p": synth}, 0.5)["p"].float().tolist() == [0.5, 2.0, -0.25]
    assert reverse_merge({"p": base}, {"p": base.clone()}, 0.5)["p"] is base


def test_names_and_shapes_that_differ():
    base = {"a": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 of 2 are missing.*1 are only there; first: b, c"):
        reverse_merge(base, {"a": torch.zeros(1), "c": torch.zeros(1)}, 1.0)
    kept = reverse_merge(base, {"a": torch.zeros(1), "c": torch.zeros(1)}, 1.0, on_mismatch="keep_base")
    assert list(kept) == ["a", "b"]
    assert kept["b"].item() == 1
    with pytest.raises(ValueError, match=r"shape \(1,\).*\(2,\)"):
        reverse_merge({"a": torch.ones(1)}, {"a": torch.ones(2)}, 1.0)
    with pytest.raises(ValueError, match="finite number"):
        reverse_merge(base, base, float("nan"))


def test_lazy_mapping_is_read_one_entry_at_a_time():
    class Lazy(dict):
        reads = 0

        def __getitem__(self, name):
            Lazy.reads += 1
            return super().__getitem__(name)

    entries = merged_entries(Lazy(state(0)), Lazy(state(1)), 1.0)
    next(entries)
    assert Lazy.reads == 2


def test_live_merge_equals_the_file_merge_and_leaves_buffers():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    base = {name: value.clone() for name, value in model.state_dict().items()}
    synth = {
        name: value + torch.randn_like(value) * 0.1 if value.is_floating_point() else value
        for name, value in base.items()
    }
    names = {name for name, _ in model.named_parameters()}
    live = LiveMerge(model, base, synth)
    for w in (1.7, 0.0, -1.0, 0.4, 1.7):  # any order, no drift
        live.set_w(w)
        expected = reverse_merge(base, synth, w, parameters=names)
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), (w, name)


def test_random_direction_has_the_norm_of_the_step_in_every_tensor():
    base, synth = state(0), state(1)
    control = RandomDirection(base, synth, list(base), seed=3)
    for name in base:
        torch.testing.assert_close(
            difference(base[name], control[name]).norm(), difference(base[name], synth[name]).norm(), rtol=1e-5, atol=0
        )
        assert not torch.allclose(control[name], synth[name])
    again = RandomDirection(base, synth, list(base), seed=3)
    assert all(torch.equal(control[name], again[name]) for name in base)
    assert not torch.equal(RandomDirection(base, synth, list(base), seed=4)["a.weight"], control["a.weight"])


def test_step_size_tells_when_the_dtype_swallows_the_step():
    base = {"p": torch.ones(1000)}
    synth = {"p": torch.full((1000,), 1 + 5e-4)}
    assert step_size(base, synth, 1.0, ["p"])["relative_step"] == pytest.approx(5e-4, rel=1e-3)
    assert step_size(base, synth, 1.0, ["p"])["swallowed"] == 0
    assert step_size({"p": base["p"].bfloat16()}, synth, 1.0, ["p"])["swallowed"] == 1


def test_a_base_of_zeros_is_no_step_of_zero():
    """An adapter before its first update: that nothing was moved is an error of a run."""
    base, synth = {"p": torch.zeros(4)}, {"p": torch.full((4,), 0.5)}
    assert step_size(base, synth, 1.0, ["p"]) == {"relative_step": 1.0, "swallowed": 0.0}
    assert step_size(base, base, 1.0, ["p"])["relative_step"] == 0


def test_the_search_keeps_two_copies_of_the_weights():
    """Model and base; the self-trained model and the random control are read tensor by tensor, the step is not kept."""

    class Counted(dict):
        alive = peak = 0

        def __getitem__(self, name):
            value = super().__getitem__(name).clone()
            Counted.alive += 1
            Counted.peak = max(Counted.peak, Counted.alive)
            weakref.finalize(value, self.freed)
            return value

        @staticmethod
        def freed():
            Counted.alive -= 1

    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(8)))
    base = {name: value.clone() for name, value in model.state_dict().items()}
    synth = Counted({name: value + 0.1 for name, value in base.items()})
    for direction in (synth, RandomDirection(base, synth, list(base), seed=0)):
        LiveMerge(model, base, direction).set_w(1.5)
    assert Counted.alive == 0
    assert Counted.peak <= 2


@pytest.mark.parametrize("w", [1e300, -1e7, math.inf, math.nan])
def test_a_w_that_no_float_can_be_multiplied_by_is_refused(w):
    base, synth = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    with pytest.raises(ValueError, match="w must be a finite number of at most 1e"):
        reverse_merge(base, synth, w)
    model = nn.ParameterList([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="w must be a finite number of at most 1e"):
        LiveMerge(model, {"0": torch.zeros(2)}, {"0": torch.ones(2)}).set_w(w)
    with pytest.raises(ValueError, match="w must be a finite number of at most 1e"):
        output_names(Path("out.safetensors"), [0.5, w])


@pytest.mark.parametrize("w", ["1.5", [1.5], {}, None])
def test_a_w_that_is_no_number_is_said(w):
    with pytest.raises(ValueError, match="w must be a finite number"):
        reverse_merge(state(0, torch.float32), state(1, torch.float32), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parameters_themselves_are_merged_like_a_state_dict(dtype):
    """named_parameters() in place of state_dict(): nothing is differentiated."""
    models = [nn.Linear(7, 5).to(dtype) for _ in range(2)]
    expected = reverse_merge(*(model.state_dict() for model in models), 1.5)
    found = reverse_merge(*(dict(model.named_parameters()) for model in models), 1.5)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert not found[name].requires_grad


def test_what_is_no_state_dict_is_refused_by_its_argument():
    model, good = nn.Linear(7, 5), nn.Linear(7, 5).state_dict()
    for merge in (lambda base, synth: reverse_merge(base, synth, 1.0), lambda *both: LiveMerge(model, *both)):
        with pytest.raises(ValueError, match=r"base must be a state dict.* not Linear: give base\.state_dict\(\)"):
            merge(model, good)
        with pytest.raises(ValueError, match=r"synth must be .* not Linear: give synth\.state_dict\(\)"):
            merge(good, model)
        with pytest.raises(ValueError, match="synth must be a state dict, tensors by name, not str"):
            merge(good, "synth.pt")
    with pytest.raises(ValueError, match="model: expected a tensor, found OrderedDict in the base: name"):
        reverse_merge({"model": good}, {"model": good}, 1.0)


@pytest.mark.parametrize(
    "w", [torch.tensor([1.5]), Fraction(3, 2), np.float32(1.5)], ids=["tensor", "fraction", "numpy"]
)
def test_a_w_of_any_kind_of_number_is_taken(w):
    base = {"weight": torch.randn(3, 2)}
    synth = {"weight": base["weight"] + 0.5}
    model = nn.Linear(2, 3, bias=False)
    model.load_state_dict(base)
    LiveMerge(model, base, synth).set_w(w)
    expected = reverse_merge(base, synth, 1.5)["weight"]
    assert torch.equal(reverse_merge(base, synth, w)["weight"], expected)
    assert torch.equal(model.weight.data, expected)
