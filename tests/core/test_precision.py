"""The arithmetic modes set what they say, and give the caller's settings back; weights are cast once per batch."""

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from neon.merge import LiveMerge
from neon.runtime.precision import CAST_BY_AUTOCAST, arithmetic
from neon.sampling import generate as generation
from neon.sampling.options import Sampling
from neon.seeds import Rng
from tests.core.line_family import Line
from tests.core.line_family import Sampling as LineSampling
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


class Sampled:
    """Batches of a family in bfloat16, and whether weights are cast once for them."""

    def __init__(self, source: generation.Source, model: nn.Module, monkeypatch: pytest.MonkeyPatch):
        self.source, self.model, self.monkeypatch = source, model.requires_grad_(False), monkeypatch

    def made(self, *, once: bool) -> tuple[Tensor, list[Tensor], Counter]:
        """Codes, what every module returned, and the casts of weights."""
        returned: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda _, __, output: returned.append(output))
            for module in self.model.modules()
        ]
        with self.monkeypatch.context() as patch, WeightCasts(self.model) as casts:
            if not once:
                patch.setattr(generation, "weights_cast_once", lambda _: nullcontext())
            codes = next(generation.generate(self.source, self.model, [range(2)], CPU)).codes
        for hook in hooks:
            hook.remove()
        assert not any(parameter.requires_grad for parameter in self.model.parameters())
        assert not any("forward" in vars(module) for module in self.model.modules())
        return codes, [value for value in returned if isinstance(value, Tensor)], casts.counts

    def check_equal(self) -> tuple[Tensor, Counter, Counter]:
        codes, returned, casts = self.made(once=True)
        expected, expected_returned, at_every_call = self.made(once=False)
        assert torch.equal(codes, expected)
        assert len(returned) == len(expected_returned)
        for value, wanted in zip(returned, expected_returned, strict=True):
            assert value.dtype == wanted.dtype
            assert torch.equal(value, wanted)
        return codes, casts, at_every_call


@pytest.mark.parametrize("name", FAMILIES)
def test_in_half_precision_a_weight_is_cast_once_per_batch_and_every_layer_gives_equal_bits(name, monkeypatch):
    family, model, config = built(name, {"precision": "bf16"})
    use_autoencoder(family, name)
    sampled = Sampled(source_of(family, model, config), model, monkeypatch)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    live = LiveMerge(model, base, {key: value * 1.1 for key, value in base.items()})
    layers = {name for name, module in model.named_modules() if type(module) in CAST_BY_AUTOCAST}
    codes = {}
    for w in (0.5, 1.5):
        live.set_w(w)
        codes[w], casts, at_every_call = sampled.check_equal()
        assert casts.keys() == at_every_call.keys()
        assert max(at_every_call.values()) > 1
        for weight, count in casts.items():
            is_used_by_itself = weight.rpartition(".")[0] in layers and "mat_qkv" not in weight
            assert count == (1 if is_used_by_itself else at_every_call[weight]), weight
    assert name == "edm" or casts.total() < at_every_call.total()  # its layers are its own
    assert not torch.equal(codes[0.5], codes[1.5])


def test_a_layer_that_works_in_float32_gives_the_bits_of_weights_cast_at_every_call(monkeypatch):
    """VAR's word_embed. torch's product of a strided input asks whether the weight takes gradients, to choose between
    two kernels; on a CPU their bits differ at this width."""
    family, model, config = built("var", {"precision": "bf16"}, model={"embed_dim": 8, "heads": 1})
    use_autoencoder(family, "var")
    Sampled(source_of(family, model, config), model, monkeypatch).check_equal()


class Islands(nn.Module):
    """`first` and `both` are called in float32 regions too, `table` is used without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.both = nn.Linear(4, 8), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(8, 8))


class OnesOwn(Line):
    """A family of a user's own, with float32 regions."""

    changes_weights = False

    def build(self, arch: Mapping[str, object]) -> Islands:
        torch.manual_seed(0)
        return Islands(**arch)

    def num_classes(self, model: nn.Module) -> int:
        return 3

    def sample(self, model: Islands, rng: Rng, labels: Tensor | None, how: LineSampling) -> tuple[Tensor, Tensor]:
        noise = rng.normal((4, 4)).transpose(1, 2)
        with torch.autocast("cpu", enabled=False):
            x = model.first(noise) @ model.table
        x = x + model.first(noise)
        for step in range(4):
            x = (model.both(x) @ model.table).float()
            with torch.autocast("cpu", enabled=False):
                x = x / x.abs().mean() + model.both(x.transpose(1, 2).contiguous().transpose(1, 2)) @ model.table
            if self.changes_weights and step % 2:
                model.both.weight.mul_(-0.9)
            elif self.changes_weights:
                model.both.weight.data = model.both.weight.data.flip(0).clone()
        assert labels is not None
        return x[:, None, :, :4], labels


@pytest.mark.parametrize("changes_weights", [False, True])
def test_float32_regions_of_ones_own_network_stay_float32(changes_weights, monkeypatch):
    family = OnesOwn()
    family.changes_weights = changes_weights
    sampling = Sampling(options=LineSampling(), precision="bf16", uint8="round")
    source = generation.Source(family=family, sampling=sampling, labels="balanced", first_seed=0, num_classes=3)
    sampled = Sampled(source, family.build({}), monkeypatch)
    before = {key: value.clone() for key, value in sampled.model.state_dict().items()}

    def made(*, once: bool) -> tuple[Tensor, list[Tensor], Counter]:
        sampled.model.load_state_dict(before)
        return Sampled.made(sampled, once=once)

    monkeypatch.setattr(sampled, "made", made)
    _, casts, at_every_call = sampled.check_equal()
    assert at_every_call["first.weight"] == 1
    assert casts["first.weight"] == 1
    assert casts["table"] == at_every_call["table"]
    if not changes_weights:
        assert at_every_call["both.weight"] == 4
        assert casts["both.weight"] == 1
