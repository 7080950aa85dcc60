"""The merge of files in one pass: every byte of both inputs is read once, in pieces, and out come the merged files,
what moved, and the inputs' hashes. Memory does not depend on the size of the models.

A thread reads (and hashes) ahead and another one writes behind. The values are those of `neon.merge.reverse_merge`,
bit for bit.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from neon.checkpoints.lazy import Entry, Source, StoredTensor
from neon.checkpoints.limits import shown
from neon.checkpoints.safetensors_format import raw_bytes
from neon.merge import OnMismatch, is_discrete, is_finite, merge_tensor

CHUNK = 1 << 18
"""Numbers per piece: with their float32 and float64 copies they fit a processor's cache."""
AHEAD = 3
SYNC = 1 << 26
"""Bytes after which a file is sent to the disk while its rest is computed: there is less to wait for at the end."""
MAX_OPEN = 100
GAP = 1 << 24
"""How far behind a read the hash of a file is brought up to it at once; a longer gap waits for the end."""


@dataclass(frozen=True)
class Item:
    """One tensor to write. synth: None copies the base's bytes. name: for messages."""

    name: str
    base: StoredTensor
    synth: Entry | None
    offset: int


@dataclass
class Output:
    """An open file for one w. `start` is where its data begins."""

    file: BinaryIO
    w: float
    start: int
    unsynced: int = 0


Write = Callable[[Output, int, memoryview], None]
"""(output, offset, content)."""


@dataclass
class Moved:
    """What one w did: |synth - base|^2 and |base|^2 over everything extrapolated, the number of moved entries, those of
    them that w could not change in their dtype, and those that left its range."""

    step_squares: float = 0.0
    base_squares: float = 0.0
    moved: int = 0
    swallowed: int = 0
    overflowed: int = 0

    def about(self) -> dict[str, float]:
        return {
            "relative_step": math.sqrt(self.step_squares / (self.base_squares or 1.0)),
            "swallowed": self.swallowed / self.moved if self.moved else 0.0,
        }


@dataclass
class RunningHash:
    """SHA-256 of a file whose bytes pass by mostly in order; what does not pass by is read at the end."""

    source: Source
    position: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def passed(self, offset: int, content: memoryview) -> None:
        if 0 < offset - self.position <= GAP:
            self.read_up_to(offset)
        if offset <= self.position < offset + len(content):
            self.digest.update(content[self.position - offset :])
            self.position = offset + len(content)

    def read_up_to(self, end: int) -> None:
        if self.position == end:
            return
        with self.source.open() as file:
            file.seek(self.position)
            while self.position < end:
                content = file.read(min(1 << 20, end - self.position))
                if not content:
                    raise ValueError(f"{self.source.path} became shorter while it was read")
                self.digest.update(content)
                self.position += len(content)

    def hexdigest(self) -> str:
        self.read_up_to(self.source.size)
        return self.digest.hexdigest()


class Reader:
    """Pieces of stored tensors, from files that stay open. One thread at a time."""

    def __init__(self, *, has_hashes: bool) -> None:
        self.has_hashes = has_hashes
        self.files: dict[Path, io.BufferedReader] = {}
        self.hashes: dict[Path, RunningHash] = {}
        self.crc32: dict[str, int] = {}  # of what was read of the tensor of each role
        self.whole: dict[str, Tensor] = {}  # the last tensor of each role that cannot be read in pieces

    def open(self, source: Source) -> io.BufferedReader:
        if source.path not in self.files:
            if len(self.files) >= MAX_OPEN:
                self.files.pop(next(iter(self.files))).close()
            self.files[source.path] = source.open()
            self.hashes.setdefault(source.path, RunningHash(source))
        return self.files[source.path]

    def read(self, entry: Entry, start: int, count: int, buffer: Tensor, role: str) -> Tensor:
        """`count` numbers from `start` on, in the order of a contiguous tensor; in `buffer` if they lie like that."""
        if not isinstance(entry, StoredTensor) or isinstance(entry.storage.source, bytes) or not entry.is_plain:
            if start == 0:
                self.whole[role] = entry.read().reshape(-1)
            return self.whole[role][start : start + count]
        dtype, source = entry.storage.dtype, entry.storage.source
        content = buffer[: count * dtype.itemsize]
        view, offset = content.numpy().data, entry.storage.offset + (entry.offset + start) * dtype.itemsize
        file = self.open(source)
        file.seek(offset)
        done = 0
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise ValueError(f"{source.path} ends inside a tensor of shape {shown(entry.shape)}: it is truncated")
            done += got
        if self.has_hashes:
            self.hashes[source.path].passed(offset, view)
        self.check(entry, start, view, role)
        return content.view(dtype)

    def check(self, entry: StoredTensor, start: int, view: memoryview, role: str) -> None:
        """Compare a tensor of a zip archive with its checksum once its last piece was read."""
        checksum = entry.storage.checksum
        if checksum is None or checksum.is_right:
            return
        if not entry.is_whole_record:
            return entry.storage.check()
        self.crc32[role] = zlib.crc32(view, self.crc32[role] if start else 0)
        if start * entry.storage.dtype.itemsize + len(view) == checksum.num_bytes:
            checksum.compare(self.crc32[role], entry.storage)

    def sha256(self, path: Path) -> str:
        """The hash of a file, all of it; what was not read yet is read now."""
        return self.hashes.setdefault(path, RunningHash(Source.of(path))).hexdigest()

    def close(self) -> None:
        for file in self.files.values():
            file.close()


class Buffers:
    """Memory of one piece on its way: both inputs, the outputs, and what still uses it."""

    def __init__(self, num_outputs: int) -> None:
        self.base, self.synth, *self.out = (torch.empty(CHUNK * 16, dtype=torch.uint8) for _ in range(2 + num_outputs))
        self.written: list[Future[None]] = []

    def wait(self) -> None:
        for future in self.written:
            future.result()
        self.written.clear()


class Scratch:
    """Memory for intermediate values of one piece, the same for every piece: fresh memory costs more than the
    arithmetic (page faults)."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}
        self.flags = np.empty(CHUNK, dtype=bool)

    def take(self, role: str, count: int, dtype: torch.dtype) -> Tensor:
        if role not in self.memory:
            self.memory[role] = torch.empty(CHUNK * 8, dtype=torch.uint8)
        return self.memory[role][: count * dtype.itemsize].view(dtype)

    def copy(self, role: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return self.take(role, len(tensor), dtype).copy_(tensor)

    def count_different(self, one: np.ndarray, other: np.ndarray | int) -> int:
        """numpy counts four times as fast as torch."""
        return int(np.count_nonzero(np.not_equal(one, other, out=self.flags[: len(one)])))


def pieces(items: Sequence[Item]) -> Iterator[tuple[Item, int, int]]:
    for item in items:
        total = math.prod(item.base.shape)
        for start in range(0, total, CHUNK):
            yield item, start, min(CHUNK, total - start)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Pieces fit a core's cache, and the other cores read, hash and write. On a busy machine torch's threads wait for
    each other at every piece: measured 50 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def merge_into(
    items: Sequence[Item],
    outputs: Sequence[Output],
    stats: Sequence[Moved],
    reader: Reader,
    on_mismatch: OnMismatch,
) -> None:
    """Write every item into every output, at its offset. stats: one per output, added to.

    Raises ValueError naming a tensor that cannot be extrapolated; the outputs are then unusable.
    """
    ring = [Buffers(len(outputs)) for _ in range(AHEAD)]
    settled: set[str] = set()  # tensors that were merged as a whole

    def load(item: Item, start: int, count: int, memory: Buffers) -> tuple[Tensor, Tensor | None]:
        base = reader.read(item.base, start, count, memory.base, "base")
        return base, None if item.synth is None else reader.read(item.synth, start, count, memory.synth, "synth")

    def write(output: Output, offset: int, content: memoryview) -> None:
        output.file.seek(output.start + offset)
        output.file.write(content)
        output.unsynced += len(content)
        if output.unsynced >= SYNC:
            syncing.submit(os.fsync, output.file.fileno())
            output.unsynced = 0

    scratch = Scratch()
    threads = (ThreadPoolExecutor(1) for _ in range(3))
    with one_torch_thread(), next(threads) as reading, next(threads) as writing, next(threads) as syncing:
        queue: deque[tuple[Item, int, Buffers, Future]] = deque()
        coming = enumerate(pieces(items))

        def fetch() -> None:
            for number, (item, start, count) in coming:
                memory = ring[number % AHEAD]
                memory.wait()
                queue.append((item, start, memory, reading.submit(load, item, start, count, memory)))
                return

        for _ in range(AHEAD - 1):
            fetch()
        while queue:
            item, start, memory, future = queue.popleft()
            base, synth = future.result()
            offset = item.offset + start * base.itemsize
            if item.name in settled:
                pass
            elif synth is None or is_discrete(base):
                for output in outputs:
                    memory.written.append(writing.submit(write, output, offset, raw_bytes(base)))
            elif not (base.is_floating_point() and synth.is_floating_point()) or not merge_piece(
                base, synth, outputs, memory.out, stats, scratch
            ):
                settled.add(item.name)
                merge_whole(item, outputs, stats, on_mismatch, lambda *given: writing.submit(write, *given).result())
            else:
                for output, out in zip(outputs, memory.out, strict=True):
                    content = out[: base.nbytes].numpy().data
                    memory.written.append(writing.submit(write, output, offset, content))
            fetch()
        for memory in ring:
            memory.wait()


def merge_piece(
    base: Tensor,
    synth: Tensor,
    outputs: Sequence[Output],
    memory: Sequence[Tensor],
    stats: Sequence[Moved],
    scratch: Scratch,
) -> bool:
    """Extrapolate one piece into `memory`, one output after the other. False, and nothing is counted, if not every
    entry is finite."""
    wider = torch.float64 if torch.float64 in (base.dtype, synth.dtype) else torch.float32
    wide = base if base.dtype == wider else scratch.copy("wide", base, wider)
    step = torch.sub(scratch.copy("step", synth, wider), wide, out=scratch.take("step", len(base), wider))
    step_squares, base_squares = torch.dot(step, step).item(), torch.dot(wide, wide).item()
    if not math.isfinite(step_squares + base_squares):
        if not (is_finite(base) and is_finite(synth)):
            return False
        step_squares, base_squares = step.double().square().sum().item(), wide.double().square().sum().item()
    moved = scratch.count_different(step.numpy(), 0)
    exact = None
    if base.dtype != wider and moved:
        exact = scratch.copy("exact wide", wide, torch.float64), scratch.copy("exact step", step, torch.float64)
    for output, content, counted in zip(outputs, memory, stats, strict=True):
        out = content[: base.nbytes].view(base.dtype)
        if output.w == 0 or moved == 0:
            out.copy_(base)
        elif output.w == -1:
            out.copy_(synth)
        elif exact is None:
            torch.add(base, step, alpha=-output.w, out=out)
        else:
            result = torch.add(*exact, alpha=-output.w, out=scratch.take("result", len(base), torch.float64))
            out.copy_(scratch.copy("narrow", result, torch.float32) if out.itemsize < 4 else result)
        counted.step_squares += step_squares
        counted.base_squares += base_squares
        counted.moved += moved
        if output.w != 0 and moved:
            one, other = (tensor.view(BITS[out.itemsize]).numpy() for tensor in (out, base))
            counted.swallowed += max(0, moved - scratch.count_different(one, other))
        if out.itemsize < 4 and out.dtype != torch.bfloat16:
            counted.overflowed += int((~out.float().isfinite()).sum())
    return True


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def merge_whole(
    item: Item, outputs: Sequence[Output], stats: Sequence[Moved], on_mismatch: OnMismatch, write: Write
) -> None:
    """A tensor with entries that are not finite: `neon.merge` decides about it as a whole."""
    assert item.synth is not None
    base, synth = item.base.read(), item.synth.read()
    for output in outputs:
        merged = merge_tensor(item.name, base, synth, output.w, on_mismatch)
        write(output, item.offset, raw_bytes(merged))
