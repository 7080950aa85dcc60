"""What a file may ask for, and how its words are shown: every number, size and name of a file passes here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MAX_INTEGER = 2**63  # torch's sizes and offsets are signed 64-bit
MAX_DIMENSIONS = 64
MAX_JSON_BYTES = 100_000_000  # the limit of the safetensors library for a header
MAX_MEMORY = 800 << 20  # bytes that a pickle may unfold to, counted generously
MAX_JSON_VALUES = 4_000_000  # commas and brackets; a header of 300,000 tensors has 2.7 million
MAX_TEXT_BYTES = 16 << 20  # the longest text of a published file is a module's source of 100 kB


class Budget:
    """Refuses a file once walking through it has met more than `limit` things, counted as often as they are met: a
    small file can hold lists that hold each other twice, 30 deep."""

    def __init__(self, limit: int, what: str) -> None:
        self.left, self.limit, self.what = limit, limit, what

    def spend(self, amount: int = 1) -> None:
        self.left -= amount
        if self.left < 0:
            raise ValueError(f"it unfolds into more than {self.limit:,} {self.what}: refused as hostile")


def natural(value: object, what: str) -> int:
    """A whole number in 0 .. 2^63 - 1. Raises ValueError for anything else (true, 1e999 and 3.0 included)."""
    if type(value) is not int or not 0 <= value < MAX_INTEGER:
        raise ValueError(f"expected {what} as a whole number from 0 to 2^63 - 1, found {shown(value)}")
    return value


def shape_of(value: object) -> tuple[int, ...]:
    """A tensor's shape (or its strides): at most 64 whole numbers, whose product without the zeros fits 63 bits."""
    if not isinstance(value, (list, tuple)) or len(value) > MAX_DIMENSIONS:
        raise ValueError(f"expected a shape of at most {MAX_DIMENSIONS} dimensions, found {shown(value)}")
    shape = tuple(natural(size, "a size") for size in value)
    product = 1
    for size in shape:
        product *= size or 1
        if product >= MAX_INTEGER:
            raise ValueError(f"a tensor of shape {shown(shape)} claims more numbers than any file holds")
    return shape


def shown(value: object, limit: int = 80) -> str:
    """A value of a file for a message: one line, printable ASCII or plain letters, short, however large it is."""
    if isinstance(value, str):
        text = clean(value[: limit + 1], limit)
    elif isinstance(value, (bytes, bytearray)):
        text = repr(bytes(value[:limit]))
    elif isinstance(value, int) and value.bit_length() > 200:
        text = f"a number of {value.bit_length():,} bits"
    elif isinstance(value, Mapping):
        text = f"a mapping of {len(value)} entries"
    elif isinstance(value, (list, tuple, set, frozenset)):
        flat = len(value) <= 8 and all(isinstance(inner, (int, float, str, type(None))) for inner in value)
        kind = type(value).__name__
        text = f"[{', '.join(shown(inner, 20) for inner in value)}]" if flat else f"a {kind} of {len(value)}"
    elif isinstance(value, (int, float, type(None))):
        text = str(value)
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."


def clean(text: str, limit: int = 1000) -> str:
    """A text that may quote a file: control characters and surrogates escaped, its middle left out if it is long."""
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]} ... {text[-limit // 4 :]}"
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def first_of(names: Iterable[str], count: int = 3) -> str:
    """The first few names of a file, for a message."""
    return ", ".join(shown(name) for _, name in zip(range(count), names, strict=False))
