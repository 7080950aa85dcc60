"""What every metric is made of: a named feature network, and how its name resolves.

A Frechet distance means nothing without the network, so an extractor carries its name, the hash of its weights and the
reason why a value computed with it may not be compared with published FIDs.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Features(NamedTuple):
    """pool: (B, dim) float32, what Frechet distance, KID and precision/recall see. logits: (B, K) float32 for the
    Inception Score, or None if the network is no classifier."""

    pool: Tensor
    logits: Tensor | None


class Extractor(ABC):
    """A feature network with a name. Subclasses set the attributes and implement `extract`."""

    name: str
    """As it stands in the metric's name, e.g. "inception-2015-12-05"."""
    dim: int
    """Number of pooled features."""
    num_classes: int = 0
    """Number of logits; 0: the network is no classifier."""
    sha256: str
    """Of the weights."""
    comparable: str | None
    """None if values may stand beside published FIDs, else the reason why not."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    @abstractmethod
    def extract(self, images: Tensor) -> Features:
        """Features of uint8 images (B, C, H, W) on `self.device`; C is 1 or 3."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (B, C, H, W), C = 1 or 3, values 0..255, from any device.

        Computed in full float32 (no TF32, no autocast): the value must not depend on the GPU's generation.
        Raises ValueError for any other dtype or shape.
        """
        if images.dtype != torch.uint8:
            raise ValueError(
                f"{self.name} takes uint8 images 0..255, got {images.dtype}: quantise with neon.quantize.to_uint8"
            )
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"{self.name} takes images (B, C, H, W) with 1 or 3 channels, got shape {tuple(images.shape)}"
            )
        with full_float32(self.device):
            found = self.extract(images.to(self.device, non_blocking=True))
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor)):
            raise ValueError(
                f"{type(self).__name__}.extract must return Features(pool, logits), logits None if there are none; it "
                f"returned a {type(found).__name__}"
            )
        pool, logits = found
        if pool.shape != (len(images), self.dim):
            raise ValueError(
                f"{self.name} promised {self.dim} features for {len(images)} images and gave {tuple(pool.shape)}"
            )
        return Features(pool.float(), None if logits is None else logits.float())


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Convolutions and products without TF32 and outside any autocast; the caller's settings come back afterwards."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


def to_rgb(images: Tensor) -> Tensor:
    """Grey images repeated to three channels; RGB as it is."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def name_with_weights(name: str, sha256: str, *, is_known: bool) -> str:
    """An extractor's name: with other weights it is another extractor, whose values must not be taken for the first
    one's."""
    return name if is_known else f"{name}-unknown-{sha256[:8]}"


class Opener(Protocol):
    """Makes an extractor. path: weights, None = where they usually lie; a network whose weights are shipped ignores the
    rest."""

    def __call__(self, *, path: Path | None, device: torch.device | str, allow_unknown_weights: bool) -> Extractor: ...


SHIPPED: dict[str, str] = {
    "inception-2015-12-05": "fid.inception:open_inception",
    "dinov2-vitl14": "fid.dinov2:open_dinov2",
    "efficientnet-lite0": "fid.efficientnet:open_efficientnet",
    "fashion-cnn": "fid.fashion:open_fashion_cnn",
    "pixel-pca64": "fid.pixel_pca:open_pixel_pca64",
}


def open_extractor(
    name: str, *, path: Path | None = None, device: torch.device | str = "cpu", allow_unknown_weights: bool = False
) -> Extractor:
    """The extractor called `name`: one of SHIPPED, or "module:attribute" of your own, an `Opener`.

    path: file of the weights (default: the cache folder, or what is shipped).
    Raises ValueError for an unknown name or wrong weights, FileNotFoundError if weights are absent, ImportError (naming
    the extra to install) if an optional package is.
    """
    target = SHIPPED.get(name, name)
    module_name, _, attribute = target.partition(":")
    if not attribute:
        raise ValueError(
            f"no extractor {name!r}; shipped: {', '.join(SHIPPED)}; one of your own is named 'module:attribute' "
            "(docs/evaluator.md), in Python score={'module:attribute': FILE}"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the extractor exists, something that it imports does not
        raise ValueError(f"extractor {name!r}: there is no module {module_name!r} on the Python path") from error
    opener: Opener | None = getattr(module, attribute, None)
    if opener is None:
        raise ValueError(f"extractor {name!r}: module {module_name!r} has no attribute {attribute!r}")
    if isinstance(opener, type):
        raise ValueError(
            f"extractor {name!r} is a class; name a function (*, path, device, allow_unknown_weights) that returns one "
            "(docs/evaluator.md)"
        )
    extractor = opener(path=path, device=device, allow_unknown_weights=allow_unknown_weights)
    if not isinstance(extractor, Extractor):
        raise ValueError(
            f"extractor {name!r}: {target} gave a {type(extractor).__name__}, expected a fid.features.Extractor"
        )
    return extractor
