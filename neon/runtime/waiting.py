"""Ranks that wait for each other: for ever while the other one is alive, and by name once it is not.

Every rank shows a sign of life each second, from a thread, in the store through which the ranks found each other. A
rank that waits looks at the signs of those that are missing. So a slow rank and a lost one are two things.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

BEAT_S = 1.0


class LostRankError(RuntimeError):
    """A rank ended or shows no sign of life; the message names it."""


class Store(Protocol):
    """What is used of torch.distributed's TCPStore."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def delete_key(self, key: str, /) -> bool: ...


class Meeting:
    """One per rank. `meet` returns once every rank has called it as often.

    connect: a new connection to the store (one that waits blocks itself, so the thread has its own).
    timeout_s: without a sign of life for so long a rank counts as lost.
    """

    def __init__(self, rank: int, size: int, connect: Callable[[], Store], timeout_s: float):
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._store, self._number = connect(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(connect(),), daemon=True)
        self._thread.start()

    def _beat(self, store: Store) -> None:
        beats = 0
        while not self._ended.is_set():
            try:
                store.set(f"alive/{self._rank}", f"{beats} {self._number}")
            except RuntimeError:  # the store is gone; whoever waits next says so
                return
            beats += 1
            self._ended.wait(BEAT_S)

    def meet(self) -> None:
        """Wait for all ranks. Raises LostRankError naming those that ended or show no sign of life."""
        self._number += 1
        here, done = f"meet/{self._number}", f"meet/{self._number}/all"
        try:
            if self._store.add(here, 1) == self._size:
                self._store.set(done, "")
                for old in (f"meet/{self._number - 1}", f"meet/{self._number - 1}/all"):  # all have left that one
                    self._store.delete_key(old)
                return
            self._wait(done)
        except LostRankError:
            raise
        except RuntimeError as error:
            raise LostRankError(f"the store of the ranks is gone, and with it rank 0 or torchrun: {error}") from error

    def _wait(self, done: str) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        while True:
            try:
                self._store.wait([done], timedelta(seconds=min(BEAT_S, self._timeout_s)))
                return
            except RuntimeError:
                if self._store.check([done]):
                    return
            lost = [text for rank in range(self._size) if rank != self._rank for text in self._lost(rank, seen)]
            if lost:
                raise LostRankError(f"rank {self._rank} waited in vain: {'; '.join(lost)}")

    def _lost(self, rank: int, seen: dict[int, tuple[bytes, float]]) -> list[str]:
        """Why a rank will not come, or nothing."""
        if self._store.check([f"ended/{rank}"]):
            return [f"rank {rank} of {self._size} ended: {self._store.get(f'ended/{rank}').decode()}"]
        key, now = f"alive/{rank}", time.monotonic()
        sign = self._store.get(key) if self._store.check([key]) else b""
        if rank not in seen or seen[rank][0] != sign:
            seen[rank] = (sign, now)
        silent_s = now - seen[rank][1]
        is_waited_for = not sign or int(sign.split()[1]) < self._number
        if silent_s > self._timeout_s and is_waited_for:
            return [f"rank {rank} of {self._size} is lost (no sign of life for {silent_s:.0f} s)"]
        return []

    def end(self, why: str | None = None) -> None:
        """Stop the signs of life; `why` goes to the ranks that still wait."""
        self._ended.set()
        if why is not None:
            try:
                self._store.set(f"ended/{self._rank}", why)
            except RuntimeError:  # the store is gone, so nobody can read it
                return
