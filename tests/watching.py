"""An audit hook: a block of a test in which nothing may be imported, compiled, executed or started."""

from __future__ import annotations

import codecs
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

RUNS = {"exec", "compile", "import", "os.system", "os.exec", "os.mkdir", "subprocess.Popen", "pickle.find_class"}
seen: list[str] = []
watched_for: list[set[str]] = []


def watch(event: str, args: tuple) -> None:
    if watched_for and event in watched_for[-1]:
        seen.append(f"{event} {args[0]}" if args else event)


for codec in ("raw_unicode_escape", "unicode_escape", "latin-1", "cp437", "utf-16", "utf-32"):
    for order in ("", "-le", "-be") if codec.startswith("utf") else ("",):
        codecs.lookup(codec + order)  # imports it: what readers of text look up is there before anyone watches
sys.addaudithook(watch)  # for the rest of the process, silent but inside `watched`


@contextmanager
def watched(events: set[str] = RUNS) -> Iterator[None]:
    """Fails if the block computes for 2 s (waiting for a busy machine does not count), or if one of the audit events
    is seen in it."""

    def stop(*_: object) -> None:
        raise TimeoutError("more than 2 s of work")

    seen.clear()
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 2.0)
    watched_for.append(events)
    try:
        yield
    finally:
        watched_for.pop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert seen == [], seen
