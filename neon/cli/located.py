"""Options that name a file which must be there: what is missing is said with where to get it, first of all."""

from __future__ import annotations

from pathlib import Path

import click

from neon.cli.messages import USER_ERRORS


class ExistingFile(click.ParamType):
    """The path of a file or folder that is there."""

    name = "path"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from neon.published.hints import need_file

        try:
            return need_file(Path(str(value)), _name_of(param))
        except USER_ERRORS as error:
            raise click.ClickException(str(error)) from error


class Statistics(ExistingFile):
    """A statistics file, or the https address of one: the file of that name that is here already, else a download into
    the cache folder, whose hash the result repeats as reference_sha256."""

    name = "path or https://"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if str(value).startswith("torchvision:"):  # a set of images in place of statistics
            return Path(str(value))
        if not str(value).startswith("https://"):
            return super().convert(value, param, ctx)
        from neon.published.fetch import fetched_address

        try:
            return fetched_address(str(value))
        except USER_ERRORS as error:
            raise click.ClickException(f"{_name_of(param)}: {error}") from error


def _name_of(param: click.Parameter | None) -> str:
    return "the file" if param is None else param.opts[0]


FILE = ExistingFile()
STATISTICS = Statistics()
