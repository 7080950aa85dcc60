"""The arithmetic modes set what they say, and give the caller's settings back; weights are cast once per batch."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neon.merge import LiveMerge
from neon.runtime.precision import arithmetic
from neon.sampling import generate as generation
from tests.core.test_gpu_without_one import FAMILIES, built, source_of, use_autoencoder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _given_back():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def settings() -> tuple[bool, bool, bool]:
    backends = torch.backends
    return backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("precision", "inside", "product"),
    [
        ("fp32", (False, False, False), torch.float32),
        ("tf32", (True, True, False), torch.float32),
        ("bf16", (True, True, True), torch.bfloat16),
        ("fp16", (True, True, True), torch.float16),
    ],
)
@pytest.mark.parametrize("before", [(False, True), (True, False)])
def test_inside_and_afterwards(precision, inside, product, before):
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    with arithmetic(CPU, precision):
        assert settings() == inside
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == product
    assert settings() == (*before, False)


def test_exact_inside_a_callers_autocast():
    with torch.autocast("cpu", torch.bfloat16), arithmetic(CPU, "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


class WeightCasts(TorchDispatchMode):
    """How often each weight of `model` is cast."""

    def __init__(self, model):
        super().__init__()
        self.names, self.counts = {p.data_ptr(): name for name, p in model.named_parameters()}, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_cast = func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy)  # the first in inference mode
        result = func(*args, **(kwargs or {}))
        if is_cast and args[0].data_ptr() in self.names and result.dtype != args[0].dtype:
            self.counts[self.names[args[0].data_ptr()]] += 1
        return result


@pytest.mark.parametrize("name", FAMILIES)
def test_in_half_precision_a_weight_is_cast_once_per_batch_and_codes_are_equal(name, monkeypatch):
    family, model, config = built(name, {"precision": "bf16"})
    use_autoencoder(family, name)
    source = source_of(family, model.requires_grad_(False), config)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    live = LiveMerge(model, base, {key: value * 1.1 for key, value in base.items()})

    def codes_and_casts():
        with WeightCasts(model) as casts:
            return next(generation.generate(source, model, [range(2)], CPU)).codes, casts.counts

    found = {}
    for w in (0.5, 1.5):
        live.set_w(w)
        codes, casts = found[w] = codes_and_casts()
        with monkeypatch.context() as patch:
            patch.setattr(generation, "weights_cast_once", lambda _: nullcontext())
            expected, at_every_call = codes_and_casts()
        assert torch.equal(codes, expected)
        assert casts.keys() == at_every_call.keys()
        assert max(at_every_call.values()) > 1
        assert casts.total() < at_every_call.total()
        assert name == "edm" or set(casts.values()) == {1}  # its convolutions cast their weights themselves
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not torch.equal(found[0.5][0], found[1.5][0])
