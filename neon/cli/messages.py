"""What a command says when something is wrong: a warning or a user's mistake is one line on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

USER_ERRORS = (ValueError, OSError, FloatingPointError, ImportError)
"""Errors whose message is for the person at the command line; others are ours, with a traceback."""


class OnStderr(logging.Handler):
    """Warnings of the whole library (`logging.getLogger("neon")` and below), once, from rank 0."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError, ValueError):  # a closed or full stderr
                click.echo(f"warning: {record.getMessage()}", err=True)


@contextmanager
def plain_messages() -> Iterator[None]:
    """Run a command: its warnings are printed, its errors end it with exit code 1 and one line."""
    _occupy_standard_streams()
    log, handler = logging.getLogger("neon"), OnStderr(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    except USER_ERRORS as error:
        raise click.ClickException(str(error)) from error
    finally:
        log.removeHandler(handler)


@contextmanager
def as_flags(options: type[DataclassInstance], **flags: str) -> Iterator[None]:
    """A mistake in these options is named as the command spells it: the field NAME is --NAME, or flags[NAME]."""
    spelling = {field.name: flags.get(field.name, f"--{field.name}") for field in fields(options)}
    try:
        yield
    except ValueError as error:
        word = rf"\b({'|'.join(spelling)})\b"
        raise ValueError(re.sub(word, lambda found: spelling[found[0]], str(error))) from error


def _occupy_standard_streams() -> None:
    """Where a standard stream was closed, its number would go to the next file that is opened, and whatever a library
    prints would go into that file."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one


def working_folder_last() -> None:
    """A family or extractor of one's own may lie in the working folder: it comes last on the module path, so that a
    file there hides nothing."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


class PlainCommand(click.Command):
    """A command that stands alone and speaks as the verbs of `neon` do."""

    def invoke(self, ctx: click.Context) -> object:
        working_folder_last()
        with plain_messages():
            return super().invoke(ctx)


class PlainGroup(click.Group):
    """Commands in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> object:
        working_folder_last()
        with plain_messages():
            return super().invoke(ctx)
