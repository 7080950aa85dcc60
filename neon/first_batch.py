"""What a family's methods return, looked at where it is used: a mistake is one sentence that says what to return.

Only shapes and dtypes, which cost nothing; `neon check` (neon/pipeline/check.py) tries the rest on a few images.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ONE_IMAGE = "rng.normal and its like take the shape of one image, without the batch"


def encoded(family: str, codes: object, batch: int) -> Tensor:
    """What `encode` made of `batch` images. Raises ValueError."""
    if not isinstance(codes, Tensor) or codes.ndim < 1 or len(codes) != batch:
        raise ValueError(
            f"{family}.encode must return a tensor with the batch ({batch}) as first dimension; it returned "
            f"{_kind(codes)}"
        )
    return codes


def sampled(family: str, returned: object, batch: int, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """(codes, labels) of `sample` for `batch` images of a network with `num_classes` labels. Raises ValueError."""
    wanted = (
        f"{family}.sample must return (codes, labels): codes with the batch ({batch}) as first dimension, labels "
        f"({batch},) int64 or None"
    )
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise ValueError(f"{wanted}; it returned {_kind(returned)}. Without labels: return codes, None")
    codes, labels = returned
    if not isinstance(codes, Tensor) or codes.ndim < 2 or len(codes) != batch:
        raise ValueError(f"{wanted}; the codes are {_kind(codes)}")
    if labels is not None and not (
        isinstance(labels, Tensor) and labels.shape == (batch,) and labels.dtype == torch.int64
    ):
        raise ValueError(f"{wanted}; the labels are {_kind(labels)}")
    if num_classes and labels is None:
        raise ValueError(f"{wanted}; num_classes is {num_classes}, so it must return the labels that it used, not None")
    return codes, labels


def decoded(maker: str, images: object, batch: int) -> Tensor:
    """The images that the method `maker` returned (`Family.maker_of_images`). Raises ValueError."""
    if (
        not isinstance(images, Tensor)
        or images.ndim != 4
        or len(images) != batch
        or not images.is_floating_point()
        or images.shape[1] not in (1, 3)
    ):
        raise ValueError(
            f"{maker} must return float images ({batch}, C, H, W) in [-1, 1] with 1 or 3 channels; it returned "
            f"{_kind(images)}{_advice_on_images(images)}"
        )
    return images


def _advice_on_images(images: object) -> str:
    if not isinstance(images, Tensor):
        return ""
    if images.ndim == 3:
        return ". The axis of channels is missing: return x[:, None]"
    if images.ndim == 5 and images.shape[0] == images.shape[1]:
        return f". {ONE_IMAGE}"
    return ". Bytes become [-1, 1] by x / 127.5 - 1" if images.dtype == torch.uint8 else ""


def drawn(family: str, draws: object, batch: int) -> Mapping[str, Tensor]:
    """The random numbers of `draw` for one step. Raises ValueError."""
    wanted = (
        f"{family}.draw must return a dict of tensors with the batch ({batch}) as first dimension, drawn from `rng` "
        "alone"
    )
    if not isinstance(draws, Mapping):
        raise ValueError(f"{wanted}; it returned {_kind(draws)}")
    for name, value in draws.items():
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != batch:
            raise ValueError(f"{wanted}; {name!r} is {_kind(value)}")
    return draws


def losses(family: str, found: object, batch: int) -> Tensor:
    """The losses of one batch. Raises ValueError."""
    if isinstance(found, Tensor) and found.shape == (batch,) and found.is_floating_point():
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ValueError(detached(family))
        return found
    advice = ""
    if isinstance(found, Tensor) and found.ndim == 0:
        advice = (
            ". A mean over the batch would make every gradient wrong by the size of the batch: average over all "
            "dimensions but the first, for example .mean((1, 2, 3))"
        )
    raise ValueError(
        f"{family}.loss must return the loss of every image, a float tensor ({batch},); it returned "
        f"{_kind(found)}{advice}"
    )


def detached(family: str) -> str:
    """What to say of a loss that gives no gradient."""
    return f"the loss of {family}.loss does not depend on the model's parameters (detach, no_grad?)"


def lies_in_unit_interval(images: Tensor) -> bool:
    """Whether these images look like [0, 1] where [-1, 1] is expected: nothing below 0, nothing above 1, not all
    one grey."""
    low, high = images.amin(), images.amax()
    return bool((low >= 0) & (high <= 1) & (low < high))


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"
