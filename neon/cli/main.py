"""The `neon` command: verbs over the library. Logs on stderr; the last line on stdout is one JSON object."""

from __future__ import annotations

from copy import copy

import click

from neon import __version__
from neon.cli import fid, files, runs
from neon.cli.download import download
from neon.cli.example import example
from neon.cli.messages import PlainGroup
from neon.cli.publish import publish
from neon.cli.sample import sample


@click.group(cls=PlainGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="neon")
def main() -> None:
    """Neon (arXiv 2510.03597): improve a trained image generator by walking away from its own samples.

    \b
        theta_neon = theta_base - w (theta_syn - theta_base),   w > 0

    theta_syn is the base model after a brief fine-tune on images that it sampled itself. `neon run CONFIG` does
    everything; synth, finetune and search are its stages, and every stage goes on where a killed one stopped. Under
    torchrun the same commands use all ranks: torchrun --standalone --nproc_per_node=8 -m neon run CONFIG
    """


for command in (example, *runs.commands, sample, publish, *files.commands, download, fid.fid):
    main.add_command(command)

select = copy(runs.select)
select.hidden = True  # another name of `neon search`: that of its section
main.add_command(select, "select")
