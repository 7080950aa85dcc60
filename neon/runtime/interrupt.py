"""Ctrl-C and SIGTERM (torchrun, Slurm) end a command with one line instead of a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from neon.runtime import INTERRUPTED
from neon.runtime.distributed import World
from neon.runtime.progress import say


@contextmanager
def told_how_to_go_on(world: World) -> Iterator[None]:
    """Run the block; a person (or a scheduler) who stops it is told that nothing is lost."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _as_interrupt) if is_main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        say(world, "stopped. What was made is kept: run the same command to go on")
        if world.size > 1:  # the other ranks may be stuck in a collective, and leaving the group waits for them
            sys.stdout.flush()
            os._exit(INTERRUPTED)
        raise SystemExit(INTERRUPTED) from None
    finally:
        if is_main_thread:
            signal.signal(signal.SIGTERM, before)


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough; the next would interrupt the tidying up
    raise KeyboardInterrupt
