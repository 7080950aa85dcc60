"""Calls replayed as graphs give the codes of calls that are not, whatever lies between them: other weights,
guidances, batches; and there are not too many graphs."""

import pytest
import torch
from torch import Tensor, nn

from neon.family import Family
from neon.merge import LiveMerge
from neon.pipeline.experiment import Experiment
from neon.runtime import speed
from neon.sampling.generate import generate
from tests.core.test_gpu_without_one import FAMILIES, built, source_of, use_autoencoder
from tests.pretend_graphs import pretend_graphs

CPU = torch.device("cpu")


class Sampled:
    """Codes by family and weights, w by w."""

    def __init__(self, name: str, **sampling: object):
        self.family: Family
        self.model: nn.Module
        self.config: Experiment
        self.family, self.model, self.config = built(name, sampling)
        use_autoencoder(self.family, name)
        self.model.requires_grad_(False)
        base = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.merge = LiveMerge(self.model, base, {key: value * 1.1 for key, value in base.items()})

    def codes(self, w: float, cfg_scale: float, indices: range) -> Tensor:
        self.merge.set_w(w)
        source = source_of(self.family, self.model, self.config)
        if self.family.is_guided:
            object.__setattr__(source, "cfg_scale", cfg_scale)
        return next(generate(source, self.model, [indices], CPU)).codes


CALLS = [
    *((w, cfg_scale, range(3)) for w in (0.0, 0.5, 1.5) for cfg_scale in (1.5, 2.5)),
    (1.5, 1.5, range(3, 5)),  # the smaller last batch of a set
    (0.5, 0.0, range(3)),
    (0.5, 1.5, range(5)),  # larger than what came before
    *((w, 1.5, range(5)) for w in (0.0, 0.5, 1.5, -0.5)),
    (1.5, 0.0, range(5)),
    *((w, 2.5, range(3, 5)) for w in (0.5, 1.0, 1.5, 2.0)),
    (0.0, 1.5, range(3)),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_calls_give_the_same_codes(name, precision):
    case = Sampled(name, precision=precision)
    expected = [case.codes(*call) for call in CALLS]
    with pretend_graphs() as graphs:
        for call, codes in zip(CALLS, expected, strict=True):
            assert torch.equal(case.codes(*call), codes), call
    assert sum(graph.replays for graph in graphs) > len(CALLS)
    assert not {"forward", case.family.graphed_method} & vars(case.model).keys()
    assert torch.equal(case.codes(*CALLS[0]), expected[0])


@pytest.mark.parametrize("name", ["edm", "xar", "var"])
def test_weights_that_were_moved_elsewhere_make_new_graphs(name):
    """To channels_last and back, for speed = "compiled", or to another device: the old graphs know freed memory."""
    case = Sampled(name)
    calls = [(w, 1.5, range(2)) for w in (0.5, 1.0, 1.5, 2.0, 2.5)]
    with pretend_graphs() as graphs:
        for call in calls:
            case.codes(*call)
        assert sum(graph.replays for graph in graphs) > 0
        for parameter in case.model.parameters():
            parameter.data = parameter.data.clone()
        again = case.codes(3.0, 1.5, range(2))
    assert torch.equal(again, case.codes(3.0, 1.5, range(2)))


def test_the_number_of_graphs_has_a_bound(monkeypatch):
    monkeypatch.setattr(speed, "MOST_GRAPHS", 3)
    case = Sampled("xar")
    with pretend_graphs() as graphs:
        found = [case.codes(0.5, 1.5, range(count)) for count in (5, 4, 3, 2, 5)]
    assert len(graphs) == 3
    assert torch.equal(found[0], found[-1])
    for count, codes in zip((5, 4, 3, 2), found, strict=False):
        assert torch.equal(codes, case.codes(0.5, 1.5, range(count)))


def test_two_places_are_two_graphs():
    """A call may be given another cache of the same shape; the first one's graph would write and read the first one."""
    case = Sampled("xar")
    x, steps, labels = torch.randn(2, 1, 64, 16), torch.full((2, 1), 500), torch.tensor([1, 2])
    others = case.model.new_cache(2), case.model.new_cache(2)

    def velocities() -> list[Tensor]:
        for cache, start in zip(others, (x, x + 1), strict=True):
            case.model(start, steps, labels, first_cell=0, cache=cache)
        return [case.model(x, steps, labels, first_cell=1, cache=cache) for cache in others]

    with torch.inference_mode():
        expected = velocities()
        assert not torch.equal(*expected)
        with pretend_graphs() as graphs, speed.accelerated(case.model, case.model, (), "exact") as is_replayed:
            assert is_replayed
            for _ in range(5):
                found = velocities()
        assert len(graphs) == 4
    assert all(map(torch.equal, found, expected))
