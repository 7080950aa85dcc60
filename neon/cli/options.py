"""Options that several commands share: declared once, handed over as one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from os import PathLike
from pathlib import Path

import click

from neon.runtime import TIMEOUT_S
from neon.store import hub

Command = Callable[..., None]
Option = Callable[[Command], Command]


class LocalPath(click.Path):
    """A path; hf://OWNER/NAME/FILE is fetched into the Hub's cache first (neon/store/hub.py)."""

    def convert(
        self, value: str | PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | PathLike[str]:
        name = str(value)
        return super().convert(hub.local(name) if hub.is_remote(name) else value, param, ctx)


PATH = LocalPath(path_type=Path)


class NewFile(click.Path):
    """The path of a file to write, whose ending says what it is."""

    def __init__(self, ending: str):
        super().__init__(path_type=Path)
        self._ending = ending

    def convert(
        self, value: str | PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | PathLike[str]:
        if Path(value).suffix.lower() != self._ending:
            self.fail(f"{value}: expected a name ending in {self._ending}", param, ctx)
        return super().convert(value, param, ctx)


REPLACES = "A file that is there is replaced, once the new one is complete."
"""What --out of a command that writes one file says: like cp, where a folder is never overwritten."""

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
