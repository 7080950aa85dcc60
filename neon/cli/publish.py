"""`neon publish`: a finished run as a folder for the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import click

from neon.cli.options import PATH


@click.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, help="The folder to write.  [default: RUN/published]")
@click.option("--push", metavar="OWNER/NAME", help="Upload it as this model repository of the Hub too.")
@click.option("--private", "is_private", is_flag=True, help="Make the repository private, if it is not there yet.")
def publish(run: Path, out: Path | None, push: str | None, is_private: bool) -> None:
    """Write a finished RUN as a folder ready for upload: weights, config, model card, pictures.

    The card holds the numbers with their controls, the protocol and the citation. A diffusers run gives a pipeline
    folder, everything else model.safetensors. Your token is that of `hf auth login` or HF_TOKEN.
    """
    from neon.pipeline import publish as publishing
    from neon.store import hub

    if push is not None:
        hub.check_name(push)
    folder = out or run / "published"
    written = publishing.publish(run, folder)
    if push is not None:
        written["pushed"] = hub.upload(folder, push, is_private=is_private)
    click.echo(json.dumps(written))
