"""Options that several commands share: declared once, handed over as one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path

import click

from neon.runtime import TIMEOUT_S

Command = Callable[..., None]
Option = Callable[[Command], Command]

PATH = click.Path(path_type=Path)

RANK_OPTIONS: tuple[Option, ...] = (
    click.option("--device", help="cpu, cuda, cuda:1 or mps.  [default: CUDA if there is one]"),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=TIMEOUT_S,
        show_default=True,
        help="Seconds without a sign of life after which a rank counts as lost.",
    ),
)
"""What every command takes that runs on ranks."""


def gathered(into: type, name: str, options: Sequence[Option]) -> Callable[[Command], Command]:
    """A decorator that gives a command these click options, and their values as the one argument `name`.

    into: a dataclass whose fields are called like the options.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_object(**values: object) -> None:
            own = {field.name: values.pop(field.name) for field in fields(into)}
            command(**values, **{name: into(**own)})

        decorated: Command = with_object
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate
