"""What a process needs to know of the machine: its ranks, its arithmetic, who is looking."""

TIMEOUT_S = 600.0
"""Seconds that a rank waits for the others before it stops with an error. Here, so that the command line knows it
without torch."""
