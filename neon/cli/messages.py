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
"""Errors whose message is for the person at the command line, as are all that arose in code of his own; others are
ours, with a traceback."""
TRACEBACK = "NEON_TRACEBACK"
"""The environment variable that, set to anything, shows every error with its traceback."""


class OnStderr(logging.Handler):
    """Warnings of the whole library (`logging.getLogger("neon")` and below), once, from rank 0."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError, ValueError):  # a closed or full stderr
                click.echo(f"warning: {record.getMessage()}", err=True)


@contextmanager
def plain_messages() -> Iterator[None]:
    """Run a command: its warnings are printed, its errors end it with exit code 1 and a sentence."""
    _occupy_standard_streams()
    log, handler = logging.getLogger("neon"), OnStderr(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    except Exception as error:
        text = None if os.environ.get(TRACEBACK) else _told(error)
        if text is None:
            raise
        raise click.ClickException(text) from error
    finally:
        log.removeHandler(handler)


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, or of this machine as torch or NumPy say it."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _told(error: Exception) -> str | None:
    """What a person is told of an error; None: it is one of ours."""
    from neon import own_code

    if is_out_of_memory(error):
        return (
            f"out of memory: {error}. Smaller batches need less and change no result: sampling.batch and the "
            "micro_batch of [finetune] or [train] in a config, the batch options of other commands"
        )
    if own_code.place(error):
        from neon.pipeline.family_errors import told

        return f"{told(error)}\n  {TRACEBACK}=1 before the command shows the whole traceback"
    return str(error) if isinstance(error, USER_ERRORS) else None


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


class PlainGroup(PlainCommand, click.Group):
    """Commands in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)
