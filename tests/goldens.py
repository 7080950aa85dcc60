"""Golden vectors: inputs and outputs of the original code, with weights seeded by the parameters' names.

The folder is $NEON_GOLDENS (default tests/goldens), laid out FAMILY/FILE. A golden test asks `collect` for the files of
its kind, so further files of the same kinds are tested without touching code; tests/test_goldens_complete.py asserts
that
every file belongs to exactly one kind. Golden tests live in tests/FAMILY/test_goldens*.py.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neon.images.image_set import ImageSet

FOLDER = Path(os.environ.get("NEON_GOLDENS") or Path(__file__).parent / "goldens")
MANIFESTS = Path(__file__).parent / "manifests"
KINDS: dict[str, list[tuple[str, str | None]]] = {}


def skip_where_draws_are_mkls() -> None:
    """For goldens with exponential or Bernoulli draws (multinomial, dropout): torch 2.5 takes them on a CPU from MKL's
    stream, the torch that recorded the goldens from its own. Known by its first number after seed 0."""
    drawn = torch.empty(20).exponential_(generator=torch.Generator().manual_seed(0))
    if math.isclose(drawn[0].item(), 2.3266, abs_tol=1e-4):
        pytest.skip("this torch draws exponential and Bernoulli numbers on a CPU from MKL's stream: not the recorded")


def collect(family: str, *patterns: str, kind: str | None = None) -> list[Path]:
    """The family's files whose name matches one of the patterns (and whose config['kind'] is `kind`, if given), sorted.

    An empty list makes pytest show the test as skipped: the folder is missing.
    """
    KINDS.setdefault(family, []).extend((pattern, kind) for pattern in patterns)
    return [file for file in files(family) if any(is_of_kind(file, pattern, kind) for pattern in patterns)]


def reference_only(family: str, *patterns: str, kind: str | None = None) -> None:
    """Kinds that describe habits of the original scripts which this project replaces: known, and not tested."""
    KINDS.setdefault(family, []).extend((pattern, kind) for pattern in patterns)


def files(family: str) -> list[Path]:
    folder = FOLDER / family
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []


def is_of_kind(file: Path, pattern: str, kind: str | None) -> bool:
    if not fnmatch.fnmatch(file.name, pattern):
        return False
    return kind is None or (file.suffix == ".npz" and config_of(file).get("kind") == kind)


def config_of(file: Path) -> dict:
    with np.load(file) as data:
        return json.loads(str(data["config"])) if "config" in data.files else {}


def published_subset(images: ImageSet, options: Mapping[str, object]) -> ImageSet:
    """What the original data loader makes of a set: `max_size` images that RandomState(`random_seed`) chooses, in
    order, and with `xflip` all of them once more, mirrored."""
    size = options.get("max_size")
    if size is not None and size < len(images):
        order = np.arange(len(images), dtype=np.int64)
        np.random.RandomState(options.get("random_seed", 0)).shuffle(order)
        images = images.subset(np.sort(order[:size]).tolist())
    if not options.get("xflip", False):
        return images
    count = len(images)

    def read(want: Sequence[int]) -> Tensor:
        flip = torch.tensor([i >= count for i in want])[:, None, None, None]
        plain = images.read([i % count for i in want])
        return torch.where(flip, plain.flip(-1), plain)

    labels = None if images.labels is None else torch.cat([images.labels] * 2)
    return replace(images, names=[*images.names] * 2, labels=labels, read=read)


def load(file: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(config, arrays) of a golden .npz."""
    with np.load(file) as data:
        arrays = {name: data[name] for name in data.files}
    return json.loads(str(arrays.pop("config"))), arrays


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def name_seeded(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The value that a parameter called `name` has in every golden (float32)."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    r = torch.randn(tuple(shape), generator=generator)
    if r.ndim >= 2:
        return r / math.sqrt(r.numel() / r.shape[0])
    return 1 + 0.1 * r if name.endswith("weight") else 0.1 * r


@torch.no_grad()
def seed_by_name(module: nn.Module, prefix: str = "") -> nn.Module:
    """Give every parameter its name-seeded value; buffers keep what the constructor gave them."""
    for name, parameter in module.named_parameters():
        parameter.copy_(name_seeded(prefix + name, parameter.shape))
    return module


def manifest(family: str, model: str) -> dict[str, list]:
    """{key: [dim, ..., dtype]} of a published checkpoint, in its order."""
    return json.loads((MANIFESTS / family / f"{model}.json").read_text())


def manifest_of(module: nn.Module) -> dict[str, list]:
    return {key: [*value.shape, str(value.dtype).removeprefix("torch.")] for key, value in module.state_dict().items()}


def assert_close(
    actual: Tensor, expected: np.ndarray | Tensor, *, atol: float, rtol: float = 0.0, what: str = ""
) -> None:
    """Finite, of the same shape, and close. (max(0, nan) is 0 in Python, so finiteness comes first.)"""
    expected = tensor(expected) if isinstance(expected, np.ndarray) else expected
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    torch.testing.assert_close(
        actual.double(), expected.double(), atol=atol, rtol=rtol, msg=lambda text: f"{what}: {text}"
    )


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout with the masks of the golden vectors: a float64 uniform number per entry, in the order of memory. Older
    torch (2.5) draws the masks with MKL's own generator, so that they depend on torch's version and the processor."""
    if not training or p == 0:
        return x
    is_kept = torch.empty_like(x, dtype=torch.float64).uniform_() < 1 - p
    return x * is_kept.to(x.dtype).div_(1 - p)
