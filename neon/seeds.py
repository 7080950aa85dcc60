"""Randomness: one generator per image, so that images do not depend on batch size or GPU count.

A sampler takes any `Rng` and cannot tell which: `ImageRng` is the default of our own runs, `SharedRng` reproduces the
streams of the original code (one generator for a whole batch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

NUM_SEEDS = 1 << 32
"""Seeds of images count modulo this number, as in the published scripts."""


class Rng(Protocol):
    """Draws for a batch of B images; every result has B as its first dimension and lies on the images' device."""

    batch: int

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) standard normal."""
        ...

    def normals(self, count: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """(count, B, *shape) standard normal: what `count` successive steps of a stochastic sampler need, in one
        block."""
        ...

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) uniform on [0, 1)."""
        ...

    def integers(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) int64, uniform on 0 .. high - 1."""
        ...

    def exponential(self, shape: Sequence[int]) -> Tensor:
        """(B, *shape) float32, exponential with rate 1; never 0."""
        ...

    def uniform_class(self, num_classes: int) -> Tensor:
        """(B,) int64 class labels, uniform on 0 .. num_classes - 1."""
        ...

    def categorical(self, probs: Tensor) -> Tensor:
        """(B, L) int64 indices drawn from probs (B, L, V), whose rows are non-negative with a positive sum."""
        ...


class ImageRng:
    """One torch.Generator per image, seeded with its seed mod 2^32 (`NUM_SEEDS`).

    The generators live on the CPU and the draws are moved to `device`, so CPU and GPU see the same noise. With
    `draw_on_device=True` they live on the device, which is how NVIDIA's EDM images were published.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", *, draw_on_device: bool = False):
        self.device = torch.device(device)
        self.batch = len(seeds)
        self.seeds = [int(seed) for seed in seeds]
        where = self.device if draw_on_device else torch.device("cpu")
        self._generators = [torch.Generator(where).manual_seed(seed % NUM_SEEDS) for seed in self.seeds]

    @property
    def generators(self) -> list[torch.Generator]:
        """One per image, for a sampler that draws by itself (diffusers' pipelines take such a list)."""
        return self._generators

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._stack(
            [torch.randn(tuple(shape), generator=g, device=g.device, dtype=dtype) for g in self._generators]
        )

    def normals(self, count: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return self.normal((count, *shape), dtype).transpose(0, 1)  # one draw per image instead of `count`

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._stack(
            [torch.rand(tuple(shape), generator=g, device=g.device, dtype=dtype) for g in self._generators]
        )

    def integers(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        return self._stack([torch.randint(high, tuple(shape), generator=g, device=g.device) for g in self._generators])

    def exponential(self, shape: Sequence[int]) -> Tensor:
        return self._stack(
            [torch.empty(tuple(shape), device=g.device).exponential_(generator=g) for g in self._generators]
        )

    def uniform_class(self, num_classes: int) -> Tensor:
        return self.integers(num_classes)

    def categorical(self, probs: Tensor) -> Tensor:
        """One uniform per token through the inverse of the cumulative distribution."""
        cumulative = probs.double().cumsum(-1)
        threshold = self.uniform(probs.shape[1:-1], torch.float64).to(probs.device) * cumulative[..., -1]
        # first index whose cumulative sum exceeds the threshold: entries of probability zero are never chosen
        index = torch.searchsorted(cumulative, threshold[..., None], right=True)[..., 0]
        last_possible = (probs > 0).to(torch.uint8).mul(torch.arange(1, probs.shape[-1] + 1, device=probs.device)).amax(
            -1
        ) - 1
        return torch.minimum(index, last_possible)

    def _stack(self, draws: list[Tensor]) -> Tensor:
        return torch.stack(draws).to(self.device)


class SharedRng:
    """The same methods over one generator for the whole batch: the streams of the original VAR, xAR and IMM code.

    `generator=None` uses torch's global generator of the device.
    """

    def __init__(self, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"):
        self.batch = batch
        self.generator = generator
        self.device = torch.device(device)
        self._where = generator.device if generator is not None else self.device

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn((self.batch, *shape), generator=self.generator, device=self._where, dtype=dtype).to(
            self.device
        )

    def normals(self, count: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.stack(
            [self.normal(shape, dtype) for _ in range(count)]
        )  # the order in which the original code draws

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand((self.batch, *shape), generator=self.generator, device=self._where, dtype=dtype).to(
            self.device
        )

    def integers(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        return torch.randint(high, (self.batch, *shape), generator=self.generator, device=self._where).to(self.device)

    def exponential(self, shape: Sequence[int]) -> Tensor:
        return (
            torch.empty((self.batch, *shape), device=self._where).exponential_(generator=self.generator).to(self.device)
        )

    def uniform_class(self, num_classes: int) -> Tensor:
        """As VAR's script draws them, which is another stream than `integers`."""
        even = torch.full((1, num_classes), 1 / num_classes, device=self._where)
        return torch.multinomial(even, self.batch, replacement=True, generator=self.generator)[0].to(self.device)

    def categorical(self, probs: Tensor) -> Tensor:
        rows = probs.reshape(-1, probs.shape[-1])
        drawn = torch.multinomial(rows, 1, replacement=True, generator=self.generator)
        return drawn.reshape(probs.shape[:-1]).to(self.device)


def image_rng(
    first_seed: int, indices: Sequence[int], device: torch.device | str, *, draw_on_device: bool = False
) -> ImageRng:
    """The generators of images `indices` of a run: image i has seed first_seed + i."""
    return ImageRng([first_seed + int(i) for i in indices], device, draw_on_device=draw_on_device)


def overlap(a: range, b: range) -> bool:
    """Whether two blocks of seeds share one, counted modulo NUM_SEEDS."""
    return (b.start - a.start) % NUM_SEEDS < len(a) or (a.start - b.start) % NUM_SEEDS < len(b)


def at_random(total: int, count: int, seed: int) -> Tensor:
    """`count` of the indices 0 .. total - 1, or all if there are no more, in rising order: images on disk are often
    sorted by class, so that the first ones are no sample."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of its parts, for streams that belong to no image (a training step, a
    control)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def global_seed(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run the block with torch's own generators, of the CPU and of `device`, at `seed`; their states come back
    afterwards."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
