"""What a waiting person sees, on stderr, from rank 0: a bar on a terminal, elsewhere one line a minute.

A closed or full stderr never stops a run.
"""

from __future__ import annotations

import contextlib
import sys
import time

from tqdm import tqdm

from neon.runtime.distributed import World

LINE_EVERY_S = 60.0


class Progress:
    """How much of `total` units is done, at which rate, and how long the rest takes."""

    def __init__(self, *, total: int, desc: str, unit: str, world: World, initial: int = 0):
        self._world, self._desc, self._unit, self._total = world, desc, unit, total
        self._initial = self._done = min(initial, total)
        self._started = self._said = time.monotonic()
        self._note = ""
        self._bar = None
        if world.is_main and _is_terminal():
            self._bar = tqdm(
                total=total, initial=self._done, desc=desc, unit=unit, dynamic_ncols=True, leave=False, file=sys.stderr
            )

    def update(self, count: int, note: str = "") -> None:
        """`count` more units are done. note: what goes with them, for example the loss."""
        count = min(count, self._total - self._done)
        self._done, self._note = self._done + count, note
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):  # ValueError: stderr was closed
                self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(count)
        elif self._world.is_main and time.monotonic() - self._said >= LINE_EVERY_S:
            self._said = time.monotonic()
            say(self._world, self.line())

    def line(self) -> str:
        """synth: 12,288 of 50,000 img (25 %), 41 img/s, 15 min left"""
        seconds = time.monotonic() - self._started
        rate = (self._done - self._initial) / seconds if seconds > 0 else 0.0
        percent = 100 * self._done / max(self._total, 1)
        parts = [f"{self._desc}: {self._done:,} of {self._total:,} {self._unit} ({percent:.0f} %)"]
        if rate > 0:
            parts.append(f"{rate:.3g} {self._unit}/s")
            parts.append(f"{duration((self._total - self._done) / rate)} left")
        return ", ".join([*parts, *([self._note] if self._note else [])])

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()


def progress(*, total: int, desc: str, unit: str, world: World, initial: int = 0) -> Progress:
    return Progress(total=total, desc=desc, unit=unit, world=world, initial=initial)


class Countdown:
    """How many of `total` things of about the same length are done, and how long the rest takes."""

    def __init__(self, total: int):
        self._total, self._done, self._took_s = total, 0, 0.0

    @property
    def is_over(self) -> bool:
        return self._done >= self._total

    def passed(self, seconds: float) -> str:
        """Another one is done, in so many seconds (0: it was there already): "point 3 of 9, 2.0 h left"."""
        self._done += 1
        self._took_s = max(self._took_s, seconds)
        rest = (self._total - self._done) * self._took_s
        return f"point {self._done} of {self._total}" + (f", {duration(rest)} left" if rest else "")


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h, 2.1 days: with as many digits as an estimate deserves."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def say(world: World, text: str) -> None:
    """One line for the person who waits, on stderr, from rank 0."""
    if world.is_main and sys.stderr is not None:  # None where it was closed before the start; tqdm would take stdout
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(f"{text}\n", file=sys.stderr, end="")  # in one piece: Ctrl-C may come between two


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stderr at all, or a closed one
        return False
