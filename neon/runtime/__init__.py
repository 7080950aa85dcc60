"""What a process needs to know of the machine: its ranks, its arithmetic, who is looking."""

TIMEOUT_S = 120.0
"""Seconds without a sign of life after which a rank counts as lost. Here, so that the command line knows it
without torch."""
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C ended, as shells report it."""
