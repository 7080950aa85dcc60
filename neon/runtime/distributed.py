"""Ranks. The only module that imports torch.distributed; everything else runs unchanged without a process group."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from neon.runtime import INTERRUPTED, TIMEOUT_S
from neon.runtime.waiting import BEAT_S, Meeting, Store

T = TypeVar("T")
JOIN_S = 600.0
"""Seconds that ranks have to find each other, and that a collective may take once all ranks are there."""
LONGEST_S = 1e7


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
        _meet()
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
        _meet()
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=_control_group)
        return cast("list[T]", values)

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        if self.size == 1:
            return value
        _meet()
        values = [value]
        dist.broadcast_object_list(values, src=0, group=_control_group)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks, as long as those that are missing are alive."""
        if self.size > 1:
            _meet()

    def batches(self, num_images: int, batch: int, first: int = 0) -> list[range]:
        """This rank's share of the images first .. num_images - 1, in batches of at most `batch`: no padding, none
        twice."""
        size = max(1, min(batch, -(-(num_images - first) // self.size)))
        return [range(start, min(start + size, num_images)) for start in range(first, num_images, size)][
            self.rank :: self.size
        ]


_control_group: dist.ProcessGroup | None = None
_meeting: Meeting | None = None
_worlds = 0
_exit_code: int | None = None
"""Of a process whose ranks ended with an error."""


@atexit.register
def _leave() -> None:
    """The process group of ranks that ended with an error cannot be taken down (the others may be stuck in a
    collective), and with it alive torch now and then aborts while the interpreter ends: SIGABRT in place of exit code
    1. By now this rank has said why. It stays two beats more, so that the others can say theirs: torchrun ends them
    with the first rank that leaves, and without torchrun the store, where those that wait read why, ends with rank
    0."""
    if _exit_code is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed or full
                stream.flush()
        if _exit_code != INTERRUPTED:
            time.sleep(2 * BEAT_S)
        os._exit(_exit_code)


def _meet() -> None:
    """Every collective begins here: a rank that works for long is waited for, a lost one is named. Raises
    LostRankError."""
    assert _meeting is not None
    _meeting.meet()


def _connect() -> Store:
    """A connection of its own to the store through which the ranks found each other."""
    where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(where, port, is_master=False, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store when it starts ranks again
    prefixed: Store = dist.PrefixStore(f"neon/{attempt}/{_worlds}", store)
    return prefixed


@contextmanager
def world(device: str | None = None, timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """Join the ranks that torchrun or Slurm started (RANK, WORLD_SIZE, MASTER_ADDR ... are set), or be alone.

    device: "cpu", "cuda", "cuda:1", "mps"; None means CUDA where there is one (LOCAL_RANK picks the card), else the
    CPU. Ranks on GPUs talk through NCCL, others through gloo; objects always go through gloo.
    timeout_s: without a sign of life for so long a rank counts as lost; a rank that works is waited for.
    """
    global _control_group, _meeting, _worlds, _exit_code
    if not 0 < timeout_s <= LONGEST_S:
        raise ValueError(f"--timeout must be > 0 and at most {LONGEST_S:.0f} seconds, got {timeout_s}")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = _device(device)
    if size == 1:
        yield World(device=where, timeout_s=timeout_s)
        return
    limit = timedelta(seconds=max(timeout_s, JOIN_S))
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", rank=rank, world_size=size, timeout=limit)
    _control_group = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=limit))  # every rank is a member
    _worlds += 1
    _meeting = Meeting(rank, size, _connect, timeout_s)
    try:
        yield World(rank, size, where, timeout_s)
        _meet()
        dist.barrier(group=_control_group)
        _meeting.end()
    except BaseException as error:
        _exit_code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else int(getattr(error, "exit_code", 1))
        why = f"{type(error).__name__}: {error}"
        _meeting.end(why)
        if rank > 0 and not isinstance(error, KeyboardInterrupt):  # rank 0's error is printed by the command
            print(f"rank {rank} of {size} stops: {why}", file=sys.stderr, flush=True)
        raise
    finally:
        # after an error the others may be stuck in a collective: waiting for them here would hide the error
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()
        _control_group = _meeting = None


def _device(device: str | None) -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    usual = {"gpu": "cuda"}.get(device, f"cuda:{device}" if device.isdecimal() else device)
    try:
        chosen = torch.device(usual)
    except RuntimeError as error:
        raise ValueError(f"--device {device}: no such device; use cpu, cuda, cuda:1 or mps") from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device}: nothing here runs on {chosen.type}; use cpu, cuda, cuda:1 or mps")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        why = "macOS is too old" if torch.backends.mps.is_built() else "this build of torch has no Metal (not a Mac?)"
        raise ValueError(f"--device {device}: {why}; leave --device away to use the CPU")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device {device}: this machine or this build of torch has no CUDA device; leave --device away to "
                "use the CPU"
            )
        if chosen.index is None:
            chosen = torch.device("cuda", local_rank)
        if chosen.index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
        torch.cuda.set_device(chosen)
    return chosen


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
