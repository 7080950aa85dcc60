"""The arithmetic of networks: exact float32, or a faster mode that a config asks for by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

Precision = Literal["fp32", "cudnn-tf32", "tf32", "bf16", "fp16"]
"""fp32: exact, also in convolutions, where torch itself would use TF32 on a GPU. tf32: products with 10 bits of
mantissa, on GPUs that have it; cudnn-tf32: in convolutions only, torch's own default and so what EDM's published script
used. bf16, fp16: autocast; stored weights stay what they are."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    """Inside autocast: a weight is cast when the block first needs it, not at every call. The same numbers; the copies
    (2 bytes per weight) live until autocast ends. Nothing in the block may change the weights.

    torch keeps the casts of weights that take gradients, but not in inference mode: so they pretend to.
    """
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    with torch.inference_mode(False), torch.no_grad():
        try:
            for parameter in frozen:
                parameter.requires_grad_(parameter.is_floating_point())
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
