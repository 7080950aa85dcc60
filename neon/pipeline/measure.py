"""What one image costs on this device, measured on a few: the rates behind `--dry-run`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from neon.evaluation.yardsticks import open_yardsticks
from neon.pipeline.probe import Probe
from neon.runtime.precision import arithmetic
from neon.training.step_data import group_of

BUDGET_S = 15.0
"""About how long a measurement may take; a slow model is measured on one image."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one image."""

    seconds: float
    flop: float
    """Floating-point operations of products and convolutions, a multiplication and an addition counted as two."""
    calls: int = 0
    """Of the network."""
    batch: int
    """Images that were measured together."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured; None where the config does not ask for it."""

    sampling: Cost | None
    training: Cost | None
    features: Cost | None
    image_bytes: int
    """Of a stored image of S."""
    encoded_bytes: int
    """Of its encoding for training; 0 if training reads the images themselves."""
    weights_bytes: int
    num_classes: int
    feature_dim: int
    """Of the headline's extractor; 0 where none was opened."""
    peak_bytes: int | None
    """Most memory of the GPU that was taken at these batches; None on a CPU."""


def measure(probe: Probe, *, with_features: bool) -> Rates:
    """Sample, train and (with_features) extract a few images. The model keeps its weights."""
    is_cuda = probe.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(probe.device)
    weights_bytes = sum(t.numel() * t.element_size() for t in probe.model.state_dict().values())
    sampling = _sampling(probe) if probe.config.sampling is not None else None
    codes, _ = probe.training_batch(1)
    stored = codes
    if probe.config.sampling is not None:
        (batch,) = probe.sample(range(1))
        is_codes = probe.config.synth is not None and probe.config.synth.store == "codes"
        stored = batch.codes if is_codes else probe.bytes_of(batch.codes)
    encoded = 0 if stored.shape == codes.shape and stored.dtype == codes.dtype else _bytes(codes)
    training = _training(probe) if probe.recipe is not None else None
    features = _features(probe) if with_features and probe.config.sampling is not None else None
    return Rates(
        sampling=sampling,
        training=training,
        features=None if features is None else features[0],
        image_bytes=_bytes(stored),
        encoded_bytes=encoded,
        weights_bytes=weights_bytes,
        num_classes=probe.num_classes,
        feature_dim=features[1] if features is not None else 0,
        peak_bytes=torch.cuda.max_memory_allocated(probe.device) if is_cuda else None,
    )


def _sampling(probe: Probe) -> Cost:
    family = copy(probe.family)
    family.replayed = ()  # graphs and compiled blocks would hide calls and products from the counters
    exact = replace(probe.source, family=family, sampling=replace(probe.source.sampling, speed="exact"))
    counted = Probe(probe.config, probe.device)
    counted.family, counted.model, counted.source = family, probe.model, exact
    graphed = family.graphed(probe.model)
    network = probe.model if graphed is None else graphed
    with _counting_calls(network, family.graphed_method) as calls, _counting() as flop:
        counted.sample(range(1))

    def work(count: int) -> None:
        for batch in probe.sample(range(count)):
            probe.bytes_of(batch.codes)

    seconds, batch = _timed(work, probe.source.sampling.batch, probe.device)
    return Cost(seconds=seconds, flop=float(flop.get_total_flops()), calls=len(calls), batch=batch)


def _training(probe: Probe) -> Cost:
    recipe = probe.recipe
    assert recipe is not None  # asked by the caller
    group = group_of(probe.family, recipe)
    codes, labels = probe.training_batch(group)
    labels = None if labels is None else labels.to(probe.device)
    parameters = [p for name, p in probe.model.named_parameters() if probe.family.trains(name, p)]

    def work(count: int) -> None:
        some, some_labels = _repeated(codes, count), None if labels is None else _repeated(labels, count)
        draws = {name: value.to(probe.device) for name, value in probe.draws(some, some_labels).items()}
        with torch.enable_grad(), arithmetic(probe.device, recipe.precision):
            probe.family.loss(probe.model, some, some_labels, draws, recipe.objective).sum().backward()

    flags = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with _counting() as flop:
            work(group)
        seconds, batch = _timed(work, recipe.micro_batch or recipe.batch, probe.device, least=group)
    finally:
        probe.model.zero_grad(set_to_none=True)
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
    return Cost(seconds=seconds, flop=flop.get_total_flops() / group, batch=batch)


def _features(probe: Probe) -> tuple[Cost, int]:
    """The cost, and the number of features of the headline's extractor."""
    assert probe.config.report is not None  # asked by the caller
    yardsticks = open_yardsticks(probe.config.report, probe.device)
    (batch,) = probe.sample(range(1))
    image = probe.bytes_of(batch.codes)

    def work(count: int) -> None:
        for yardstick in yardsticks:
            yardstick.extractor(_repeated(image, count))

    with _counting() as flop:
        work(1)
    seconds, size = _timed(work, probe.source.sampling.batch, probe.device)
    return Cost(seconds=seconds, flop=float(flop.get_total_flops()), batch=size), yardsticks[0].extractor.dim


def _timed(work: Callable[[int], None], most: int, device: torch.device, *, least: int = 1) -> tuple[float, int]:
    """(seconds per image, batch): `work` on as many images as the budget allows, after it has run on the least."""
    single = _seconds(work, least, device) / least
    count = max(least, min(most, int(BUDGET_S / max(single, 1e-9))) // least * least)
    return _seconds(work, count, device) / count, count


def _seconds(work: Callable[[int], None], count: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work(count)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


class _Decomposed(TorchDispatchMode):
    """Hands the counter below it the products that a linear layer or a matmul is made of: in inference mode, where
    sampling runs, they arrive whole, and the counter of torch 2.5 takes them for nothing."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        kwargs = dict(kwargs or {})
        with self:
            result = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Attention as its two products: the counter knows none of the CPU's fused ones."""
    with FlopCounterMode(display=False) as flop, _Decomposed(), sdpa_kernel(SDPBackend.MATH):
        yield flop


@contextmanager
def _counting_calls(network: nn.Module, method: str) -> Iterator[list[None]]:
    calls: list[None] = []
    called = getattr(network, method)

    def counted(*args: object, **named: object) -> object:
        calls.append(None)
        return called(*args, **named)

    had = vars(network).get(method)
    vars(network)[method] = counted
    try:
        yield calls
    finally:
        del vars(network)[method]
        if had is not None:
            vars(network)[method] = had


def _repeated(values: Tensor, count: int) -> Tensor:
    """(count, ...): the first values over and over."""
    return values[torch.arange(count, device=values.device) % len(values)]


def _bytes(values: Tensor) -> int:
    """Of one image of the batch."""
    return values[0].numel() * values.element_size()
