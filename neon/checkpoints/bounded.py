"""A file that hands out no more than it has, however much a pickle asks for."""

from __future__ import annotations

import io
from dataclasses import dataclass

from neon.checkpoints.lazy import Readable, window
from neon.checkpoints.limits import Budget, shown

BLOCK = 1 << 16


@dataclass(frozen=True)
class Span:
    """Bytes that stay in the file."""

    offset: int
    length: int


class Bounded:
    """Reads a file in blocks, with a position of its own, and refuses to read more than the file has before anything
    is allocated. `bytes_of` and `part` give at most twice the file's size in all: a small pickle may ask for the same
    bytes again and again."""

    def __init__(self, file: Readable) -> None:
        self.file = file
        self.start = file.tell()
        self.size = file.seek(0, io.SEEK_END)
        self.block, self.at = b"", 0
        self.budget = Budget(2 * self.size + (1 << 20), "bytes")

    def tell(self) -> int:
        return self.start + self.at

    def seek(self, offset: int) -> None:
        if 0 <= offset - self.start <= len(self.block):
            self.at = offset - self.start
        else:
            self.start, self.block, self.at = offset, b"", 0

    def read(self, length: int) -> bytes:
        end = self.at + length
        if end > len(self.block):
            self.require(length)
            self.refill(length)
            end = length
        content = self.block[self.at : end]
        self.at = end
        return content

    def readline(self) -> bytes:
        """Up to the next end of a line; only names and numbers have one."""
        if self.block.find(b"\n", self.at) < 0:
            self.refill(BLOCK)
        return self.read(self.block.find(b"\n", self.at) + 1 - self.at)

    def refill(self, length: int) -> None:
        self.start, self.at = self.tell(), 0
        self.file.seek(self.start)
        self.block = self.file.read(max(length, BLOCK))

    def require(self, length: int) -> None:
        left = self.size - self.tell()
        if length > left:
            raise ValueError(f"it wants {length} more bytes and has {left}: truncated, damaged or hostile")

    def bytes_of(self, value: object) -> bytes:
        """The content of a span (or of bytes that were written as text)."""
        if isinstance(value, bytes):
            return value
        if not isinstance(value, Span):
            raise ValueError(f"expected bytes, found {shown(value)}")
        self.budget.spend(value.length)
        self.file.seek(value.offset)
        return self.file.read(value.length)

    def part(self, value: object) -> Bounded:
        """What `bytes_of` gives, as a file of its own; a span is not read for it."""
        if not isinstance(value, Span):
            return Bounded(io.BytesIO(self.bytes_of(value)))
        self.budget.spend(value.length)
        return Bounded(window(self.file, value.offset, value.length))
