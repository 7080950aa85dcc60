"""Every command and option as text. After a change on purpose:

python -m tests.core.cli_listing > tests/core/cli_listing.txt
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import click

from neon.cli.main import main

FAMILIES = ("edm", "flow", "imm", "var", "xar")


def lines(name: str, command: click.Command) -> Iterator[str]:
    """The command, its arguments and options in the order of its help, then its subcommands."""
    yield name + (" (hidden)" if command.hidden else "")
    for parameter in command.params:
        yield f"    {' '.join([*parameter.opts, *parameter.secondary_opts])}{properties(parameter)}"
    if isinstance(command, click.Group):
        for word, inner in command.commands.items():
            yield from lines(f"{name} {word}", inner)


def properties(parameter: click.Parameter) -> str:
    kind = parameter.type
    choices = f" {'|'.join(map(str, kind.choices))}" if isinstance(kind, click.Choice) else f" {kind.name}"
    is_flag = isinstance(parameter, click.Option) and parameter.is_flag
    default = parameter.to_info_dict()["default"]
    return "".join(
        [
            "" if is_flag else choices,
            ", required" if parameter.required else "",
            ", repeatable" if parameter.nargs != 1 or getattr(parameter, "multiple", False) else "",
            "" if is_flag or default is None or "UNSET" in repr(default) else f", default {default}",
        ]
    )


def listing() -> str:
    commands = {"neon": main}
    commands |= {f"{name}/calculate_fid.py": importlib.import_module(f"{name}.calculate_fid").main for name in FAMILIES}
    return "".join(f"{line}\n" for name, command in commands.items() for line in lines(name, command))


if __name__ == "__main__":
    click.echo(listing(), nl=False)
