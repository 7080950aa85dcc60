"""Options that several commands share: declared once, handed over as one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps

Command = Callable[..., None]


def gathered(into: type, name: str, options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
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
