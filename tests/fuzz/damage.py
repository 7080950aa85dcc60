"""What happens to a file: a bit flips, a sector is lost, a copy stops, a program writes nonsense."""

from __future__ import annotations

import random
from collections.abc import Callable


def flip(data: bytearray, rng: random.Random) -> bytearray:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def zero(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data) + 1)
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    return data


KINDS: dict[str, Callable[[bytearray, random.Random], bytearray]] = {
    "flip": flip,
    "zero": zero,
    "cut": lambda data, rng: data[: rng.randrange(len(data) + 1)],
    "empty": lambda data, rng: bytearray(),
    "garbage": lambda data, rng: bytearray(rng.randbytes(rng.randrange(1, 400))),
}


def damaged(content: bytes, kind: str, seed: int) -> bytes:
    return bytes(KINDS[kind](bytearray(content), random.Random(seed)))
