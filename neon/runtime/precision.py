"""The arithmetic of networks: exact float32, or a faster mode that a config asks for by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Precision = Literal["fp32", "cudnn-tf32", "tf32", "bf16", "fp16"]
"""fp32: exact, also in convolutions, where torch itself would use TF32 on a GPU. tf32: products with 10 bits of
mantissa, on GPUs that have it; cudnn-tf32: in convolutions only, torch's own default and so what EDM's published script
used. bf16, fp16: autocast; stored weights stay what they are."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
CAST_BY_AUTOCAST = get_args(Layer)
"""Each is one product of its weights, which autocast casts wherever it is on. Subclasses may do anything with them."""


@contextmanager
def arithmetic(device: torch.device, precision: Precision) -> Iterator[None]:
    """Run the block in this precision; the caller's settings come back afterwards."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision not in ("fp32", "cudnn-tf32")
    try:
        with torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


@contextmanager
def weights_cast_once(network: nn.Module) -> Iterator[None]:
    """Where autocast is on, torch's own linear and convolutional layers cast their weights when they first need them,
    not at every call: the same operations on the same numbers. The copies (2 bytes per weight) live until the block
    ends. Whatever else the network does with its weights, it does with the weights themselves.

    torch would keep the casts of weights that take gradients. But whether a weight does decides also which kernel a
    product takes, in float32 regions too, so the same numbers would be rounded otherwise.
    """
    own = [layer for layer in network.modules() if type(layer) in CAST_BY_AUTOCAST and "forward" not in vars(layer)]
    layers = cast("list[Layer]", own)
    try:
        for layer in layers:
            vars(layer)["forward"] = _with_weights_cast_once(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _with_weights_cast_once(layer: Layer) -> Callable[[Tensor], Tensor]:
    product: Callable[..., Tensor] = F.linear if isinstance(layer, nn.Linear) else layer._conv_forward
    weight, bias = _Cast(), _Cast()

    def forward(input: Tensor) -> Tensor:
        kind = input.device.type
        if not torch.is_autocast_enabled(kind):
            return product(input, layer.weight, layer.bias)
        dtype = torch.get_autocast_dtype(kind)
        return product(input, weight.of(layer.weight, dtype), bias.of(layer.bias, dtype))

    return forward


class _Cast:
    """The last cast of a tensor, made anew once the tensor is another or has other numbers."""

    def __init__(self) -> None:
        self._made_of: object = None

    def of(self, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if tensor is None or tensor.dtype != torch.float32 or tensor.is_inference():  # which knows no versions
            return tensor
        made_of = tensor.data_ptr(), tensor.stride(), tensor._version, dtype
        if made_of != self._made_of:
            self._made_of = made_of
            self._kept = tensor.detach()  # so that no other tensor comes to lie at its address
            self._cast = tensor.to(dtype)
        return self._cast
