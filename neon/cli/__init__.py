"""The command line. Its modules import click and nothing slow at the top; a command imports what it works with when it
is invoked, so that help and completion answer at once (tests/core/test_cli.py holds them to it)."""

import os

# Torch reads it at its first tensor: on Linux large ones then lie in huge pages. The system takes the memory of every
# freed one back, and fetching it again in pages of 4 KiB was a seventh of a decoder's time. "0" leaves it off. Here and
# not in a room below: where neon.library is called the process is the caller's.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Threads that wait spin for milliseconds, which on a machine that others use too is time that the others' threads hold:
# with two busy neighbours on two cores sampling took 1.7 times as long. Measured on two cores only, hence the bound.
if (os.cpu_count() or 1) <= 4 and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
