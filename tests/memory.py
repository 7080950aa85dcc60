"""The memory of a block: what is resident at its peak above what was held before (Linux; elsewhere an upper bound)."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path


def begin_peak() -> int:
    """The memory that this process holds, in KiB; where the system can (Linux), `peak` counts from here on.

    What malloc keeps of freed blocks is given back first: what finds its place there would not be seen."""
    if sys.platform != "linux":
        return peak()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """In KiB, of the process."""
    return _status("VmHWM") if sys.platform == "linux" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])
