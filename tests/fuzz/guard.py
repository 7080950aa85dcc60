"""What every case must keep to: two seconds of work, a gigabyte of memory, nothing of a file runs. And where cases that
were found are kept."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import memory, watching

KIBIBYTES = 1 << 20
FOUND = Path(__file__).with_name("found.jsonl")
"""A case a line. A test that finds one adds it; commit it with the mend."""


@contextmanager
def watched(allowed: frozenset[str] = frozenset()) -> Iterator[None]:
    """Fails if the block computes for 2 s (waiting for a busy machine does not count), takes 1 GB more than there was,
    or if anything but `allowed` is imported, compiled, executed or started in it."""

    resident = memory.begin_peak()
    with watching.watched(watching.RUNS - allowed):
        yield
    assert memory.peak() - resident < KIBIBYTES, "more than 1 GB of memory"


def found(test: str) -> list[dict]:
    """The cases of a test that were found before."""
    lines = map(json.loads, FOUND.read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "test"} for line in lines if line["test"] == test]


@contextmanager
def kept(test: str, **case: object) -> Iterator[None]:
    """Writes the case down if the block fails. Bytes are written as base64 (`content` gives them back)."""
    try:
        yield
    except Exception as error:
        plain = {key: base64.b64encode(v).decode() if isinstance(v, bytes) else v for key, v in case.items()}
        line = json.dumps({"test": test, **plain}) + "\n"
        if line not in FOUND.read_text().splitlines(keepends=True):
            with FOUND.open("a") as file:
                file.write(line)
        shown = {key: str(value)[:100] for key, value in case.items()}
        raise AssertionError(f"{test} {shown}: {type(error).__name__}: {str(error)[:400]}") from error


def content(text: str) -> bytes:
    return base64.b64decode(text)
