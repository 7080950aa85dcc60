"""The guard of the fuzz tests notices what it is there for, and a case that fails is written down."""

import os
import pickle
import sys

import numpy as np
import pytest

from tests.fuzz import guard


def work() -> None:
    while True:
        sum(range(1000))


@pytest.mark.parametrize(
    ("offence", "error"),
    [
        (work, TimeoutError),
        (lambda: np.ones(1 << 25), AssertionError),
        (lambda: os.system("true"), AssertionError),
        (lambda: eval("1 + 1"), AssertionError),
        (lambda: pickle.loads(pickle.dumps(os.system)), AssertionError),
    ],
)
def test_an_offence_is_noticed(offence, error, monkeypatch):
    monkeypatch.setattr(guard, "KIBIBYTES", 100 << 10)
    with pytest.raises(error), guard.watched():
        offence()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the whole process")
def test_memory_that_malloc_had_kept_is_noticed(monkeypatch):
    """Blocks that find their place among those of earlier work: the process does not grow."""
    monkeypatch.setattr(guard, "KIBIBYTES", 100 << 10)
    np.empty(31 << 20, np.uint8)  # malloc learns from its end: blocks up to 31 MiB come from the heap
    *blocks, last = [np.ones(1 << 19) for _ in range(41)]  # 4 MiB each
    blocks.clear()  # the heap cannot shrink: the last lies at its end
    with pytest.raises(AssertionError, match="more than 1 GB of memory"), guard.watched():
        blocks += [np.ones(1 << 19) for _ in range(40)]
    assert last.all()


def test_a_case_that_fails_is_kept_once(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "FOUND", tmp_path / "found.jsonl")
    guard.FOUND.touch()
    for _ in range(2):
        with pytest.raises(AssertionError, match="hostile"), guard.kept("hostile", content=b"\xff", seed=3):
            raise KeyError("x")
    (case,) = guard.found("hostile")
    assert (guard.content(case["content"]), case["seed"]) == (b"\xff", 3)
    assert guard.found("another") == []
