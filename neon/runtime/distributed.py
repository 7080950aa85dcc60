"""Ranks. The only module that imports torch.distributed; everything else runs unchanged without a process group."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from neon.runtime import TIMEOUT_S

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers. A world of size 1 needs no process group and its verbs cost nothing."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout_s: float = TIMEOUT_S

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all ranks, in place. All ranks pass the same shapes in the same
        order."""
        if self.size == 1:
            return
        for group in _by_dtype(tensors):
            flat = torch.cat([t.reshape(-1) for t in group])
            flat = flat if dist.get_backend() == "gloo" else flat.to(self.device)  # NCCL sums on the GPU only
            dist.all_reduce(flat)
            for tensor, piece in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(piece.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """Every rank's (small, picklable) value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=_control_group)
        return cast("list[T]", values)

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=_control_group)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks; a rank that does not come within the timeout is named in the error."""
        if self.size > 1:
            dist.monitored_barrier(group=_control_group, timeout=timedelta(seconds=self.timeout_s), wait_all_ranks=True)

    def batches(self, num_images: int, batch: int, first: int = 0) -> list[range]:
        """This rank's share of the images first .. num_images - 1, in batches of at most `batch`: no padding, none
        twice."""
        size = max(1, min(batch, -(-(num_images - first) // self.size)))
        return [range(start, min(start + size, num_images)) for start in range(first, num_images, size)][
            self.rank :: self.size
        ]


_control_group: dist.ProcessGroup | None = None


@contextmanager
def world(device: str | None = None, timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """Join the ranks that torchrun or Slurm started (RANK, WORLD_SIZE, MASTER_ADDR ... are set), or be alone.

    device: "cpu", "cuda", "cuda:1", "mps"; None means CUDA where there is one (LOCAL_RANK picks the card), else the
    CPU. Ranks on GPUs talk through NCCL, others through gloo; objects and barriers always go through gloo.
    """
    global _control_group
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = _device(device)
    if size == 1:
        yield World(device=where, timeout_s=timeout_s)
        return
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", rank=rank, world_size=size, timeout=limit)
    _control_group = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=limit))  # every rank is a member
    try:
        yield World(rank, size, where, timeout_s)
        dist.barrier(group=_control_group)
    except BaseException as error:
        print(f"rank {rank} of {size} stops: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        # after an error the others may be stuck in a collective: waiting for them here would hide the error
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()
        _control_group = None


def _device(device: str | None) -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device {device}: this machine or this build of torch has no CUDA device; leave --device away to "
                "use the CPU"
            )
        if chosen.index is None:
            chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    return chosen


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
