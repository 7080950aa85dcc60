"""A GPU that is not there: tensors that say they lie on cuda:0, compute on the CPU, and refuse what a GPU would refuse.

Unlike fake tensors they hold values, so control flow, gradients and results are real. `PretendCuda` counts what costs
time on a GPU: host reads of device memory (item, tolist, bool, `.cpu()`) and moves to the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
"""Operations whose result the host must wait for."""


class OnCuda(Tensor):
    """A tensor of the pretended GPU. `inner` holds its values."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCuda:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=CUDA, requires_grad=inner.requires_grad
        )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor):
        pass

    def __repr__(self) -> str:
        return f"OnCuda({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of pretending: enter PretendCuda first")


class PretendCuda(TorchDispatchMode):
    """While entered, device="cuda" works. counts: "reads", "to device" and the names of the operations that read."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if name == "to":  # arrives whole under inference_mode; what it consists of is counted
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        on_cuda = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
        target = kwargs.get("device")
        wants_cuda = target is not None and torch.device(target).type == "cuda"
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        if name == "_fused_sdp_choice":
            return 0  # the plain formula
        if on_cuda and name not in ("_to_copy", "copy_"):
            stray = [t for t in tensors if not isinstance(t, OnCuda) and t.ndim > 0]
            if stray and not (name.startswith("index") or name == "_index_put_impl_"):  # host indices are allowed
                raise RuntimeError(f"{name}: tensors on cuda:0 and cpu, of shapes {[tuple(t.shape) for t in tensors]}")
        by_flags = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors[1:])
        reads = bool(on_cuda) and (
            name in READS or by_flags or (name in ("_to_copy", "copy_") and self._is_to_host(name, args, target))
        )
        if reads:
            self.counts["reads"] += 1
            self.counts[name] += 1
        if name == "_to_copy" and wants_cuda and not on_cuda:
            self.counts["to device"] += 1
        given_args, given_kwargs = tree_map(_inner, (args, kwargs))
        result = func(*given_args, **given_kwargs)
        if name == "copy_":
            return args[0]
        stays = bool(on_cuda) and (target is None or wants_cuda)
        if not (stays or wants_cuda):
            return result
        return tree_map(lambda value: self._outer(value, args, result), result)

    @staticmethod
    def _is_to_host(name: str, args: tuple, target: object) -> bool:
        if name == "copy_":
            return isinstance(args[1], OnCuda) and not isinstance(args[0], OnCuda)
        return target is not None and torch.device(target).type == "cpu"

    @staticmethod
    def _outer(value: object, args: tuple, result: object) -> object:
        if not isinstance(value, Tensor) or isinstance(value, OnCuda):
            return value
        for original in tree_flatten(args)[0]:  # in-place operations return the tensor they were given
            if isinstance(original, OnCuda) and original.inner is value:
                return original
        with torch.inference_mode(False):  # an inference tensor could not be wrapped again by a view of it
            return OnCuda(value)


def _inner(value: object) -> object:
    return value.inner if isinstance(value, OnCuda) else value


@contextmanager
def pretend_cuda() -> Iterator[PretendCuda]:
    """Run the block with a pretended GPU; gives the counts."""
    torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing; these two lines are what torch's fake tensors do
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # module.to(): a parameter becomes an OnCuda
    try:
        with (
            mock.patch("torch.cuda._lazy_init", return_value=None),
            torch.backends.cudnn.flags(enabled=False),
            PretendCuda() as mode,
        ):
            yield mode
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        torch._C._set_only_lift_cpu_tensors(lifts)
