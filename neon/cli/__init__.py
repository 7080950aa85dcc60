"""The command line. Its modules import click and nothing slow at the top; a command imports what it works with when it
is invoked, so that help and completion answer at once (tests/core/test_cli.py holds them to it)."""
