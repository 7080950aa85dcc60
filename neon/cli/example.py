"""`neon example`: a model of one's own to start from, complete."""

from __future__ import annotations

import json
from pathlib import Path

import click

from neon.cli.options import PATH


@click.command()
@click.option("--out", type=PATH, required=True, help="The folder to make; files that are there are never replaced.")
def example(out: Path) -> None:
    """Write a complete example of a model of your own: mine.py, mine.toml and a small training set.

    \b
    neon example --out first && cd first && neon check mine.toml
    """
    import shutil

    import neon
    from neon.published.shipped import shipped_folder

    code = Path(neon.__file__).parent / "example"
    wanted = {name: code / name for name in ("mine.py", "mine.toml")}
    wanted |= {
        f"demo/{name}": shipped_folder("demo") / name for name in ("fashion_base.npz", "reference_pixel-pca64.npz")
    }
    if there := [name for name in wanted if (out / name).exists()]:
        raise FileExistsError(f"{out / there[0]} is there already: name another folder with --out")
    for name, source in wanted.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, out / name)
    for line in (
        f"cd {out}",
        "neon check mine.toml",
        "neon train mine.toml --out runs/mine_base",
        "neon run mine.toml",
    ):
        click.echo(line, err=True)
    click.echo(json.dumps({"out": str(out), "files": list(wanted)}))
