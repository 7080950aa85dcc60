"""`neon download`: published files by name, group or address."""

from __future__ import annotations

import json
from pathlib import Path

import click

from neon.cli.options import PATH


def overview(root: Path) -> list[dict[str, object]]:
    """The table as data, with what is there."""
    from neon.published.table import TABLE

    return [
        {
            "name": item.name,
            "group": item.group,
            "source": item.source,
            "path": str(item.target(root)),
            "there": item.target(root).is_file(),
        }
        for item in TABLE
    ]


@click.command()
@click.argument("names", nargs=-1)
@click.option(
    "--models",
    is_flag=True,
    help="Neon checkpoints, their autoencoders, ADM statistics.  [default, if nothing is named]",
)
@click.option("--refs", is_flag=True, help="EDM's reference statistics and the FID Inception.")
@click.option("--bases", is_flag=True, help="The base models that Neon started from.")
@click.option("--list", "is_list", is_flag=True, help="Print the table and what is there; fetch nothing.")
@click.option(
    "--root",
    type=PATH,
    default=Path(),
    help="Folder that gets checkpoints/ and fid_stats/.  [default: here]",
)
def download(names: tuple[str, ...], models: bool, refs: bool, bases: bool, is_list: bool, root: Path) -> None:
    """Fetch published files by NAME, by group, or from an https address.

    What is there is skipped, what was cut is resumed, hashes are checked.
    """
    from neon.published.fetch import DownloadError, NoNetworkError, by_hand, fetch, host_of
    from neon.published.table import GROUPS, select

    if is_list:
        rows = overview(root)
        for row in rows:
            click.echo(
                f"{'have' if row['there'] else '    '} {row['group']:6} {row['name']:38} {row['source']} -> "
                f"{row['path']}",
                err=True,
            )
        click.echo(json.dumps(rows))
        return
    flags = {"models": models or not (names or refs or bases), "refs": refs, "bases": bases}
    done, failed = [], []
    unreachable: set[str] = set()
    for item in select(names, [group for group in GROUPS if flags[group]]):
        try:
            if host_of(item) in unreachable and not item.target(root).is_file():
                raise DownloadError(f"{item.name}: not tried. {by_hand(item, item.target(root))}")
            done.append(fetch(item, root))
            click.echo(f"{done[-1]['status']:10} {done[-1]['path']}", err=True)
        except DownloadError as error:  # files of other servers are still worth having
            if isinstance(error, NoNetworkError):
                unreachable.add(host_of(item))
            failed.append({"name": item.name, "error": str(error)})
            click.echo(f"FAILED     {error}", err=True)
    click.echo(json.dumps({"files": done, "failed": failed}))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    download(prog_name="neon download")
