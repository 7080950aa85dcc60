"""The `neon` command: verbs over the library. Logs on stderr; the last line on stdout is one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click

from neon import __version__
from neon.binding import to_plain
from neon.cli import fid, files
from neon.cli.options import gathered
from neon.pipeline.evaluate_base import evaluate_base
from neon.pipeline.experiment import Experiment, load
from neon.pipeline.run import Run
from neon.pipeline.train_autoencoder import train_autoencoder
from neon.pipeline.train_base import train_base
from neon.runtime.distributed import TIMEOUT_S, World, world
from neon.search.options import Select
from neon.store.files import folder_lock

PATH = click.Path(path_type=Path)


class Commands(click.Group):
    """Commands in the order in which one meets them; a user's mistake is one line on stderr and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, FloatingPointError, ImportError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="neon")
def main() -> None:
    """Neon (arXiv 2510.03597): improve a trained image generator by walking away from its own samples.

    \b
        theta_neon = theta_base - w (theta_syn - theta_base),   w > 0

    theta_syn is the base model after a brief fine-tune on images that it sampled itself. `neon run CONFIG` does
    everything; synth, finetune and grid are its stages, and every stage goes on where a killed one stopped. Under
    torchrun the same
    commands use all ranks: torchrun --standalone --nproc_per_node=8 -m neon run CONFIG
    """


@dataclass(frozen=True)
class OnConfig:
    """What every verb on a config is asked: CONFIG and `config_options`."""

    config: Path
    overrides: tuple[str, ...]
    out: Path | None
    device: str | None
    timeout: float
    dry_run: bool

    def do(self, work: Callable[[Experiment, Path, World], dict[str, object]]) -> None:
        """Load and check the config, own the run's folder, do the work on all ranks, print the result."""
        experiment = load(self.config, self.overrides)
        folder = self.out or Path("runs") / self.config.stem
        if self.dry_run:
            click.echo(json.dumps({"out": str(folder), **to_plain(experiment)}))  # type: ignore[dict-item]
            return
        with world(self.device, self.timeout) as ranks:
            if ranks.is_main:
                with folder_lock(folder):
                    result = work(experiment, folder, ranks)
                    ranks.barrier()
                click.echo(json.dumps(result))
            else:
                work(experiment, folder, ranks)
                ranks.barrier()


config_options = gathered(
    OnConfig,
    "on",
    [
        click.argument("config", type=PATH),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="Replace a value of the config; repeatable.",
        ),
        click.option("--out", type=PATH, help="Folder of the run.  [default: runs/NAME-OF-CONFIG]"),
        click.option("--device", help="cpu, cuda, cuda:1 or mps.  [default: CUDA if there is one]"),
        click.option(
            "--timeout", type=float, default=TIMEOUT_S, show_default=True, help="Seconds to wait for other ranks."
        ),
        click.option("--dry-run", is_flag=True, help="Check the config, print the resolved plan as JSON and stop."),
    ],
)


@main.command()
@config_options
def run(on: OnConfig) -> None:
    """Everything: synth, finetune, select w, report on held-out noise, merged file, one page."""
    on.do(lambda e, folder, ranks: Run(e, folder, ranks).all())


@main.command()
@config_options
def synth(on: OnConfig) -> None:
    """Stage 1: sample the synthetic set S with the base model's ordinary sampler."""

    def work(experiment: Experiment, folder: Path, ranks: World) -> dict[str, object]:
        found = Run(experiment, folder, ranks).synth()
        return {"num_images": len(found), "folder": str(folder / "synth")}

    on.do(work)


@main.command()
@config_options
def finetune(on: OnConfig) -> None:
    """Stage 2: fine-tune the base briefly on S (makes S first if it is not there)."""

    def work(experiment: Experiment, folder: Path, ranks: World) -> dict[str, object]:
        return {"snapshots": [str(path) for path in Run(experiment, folder, ranks).finetune()]}

    on.do(work)


@main.command()
@config_options
def grid(on: OnConfig) -> None:
    """Stage 3: score every (snapshot, w, cfg_scale) on the selection seeds, with w = 0, w = -1 and a random
    direction."""

    def work(experiment: Experiment, folder: Path, ranks: World) -> dict[str, object]:
        winner, scores = Run(experiment, folder, ranks).select()
        experiment.need("select", Select)
        points = [{**to_plain(s.point), "metrics": s.metrics} for s in scores]  # type: ignore[dict-item]
        return {"chosen": {**to_plain(winner.point), "metrics": winner.metrics}, "points": points}  # type: ignore[dict-item]

    on.do(work)


@main.command("eval")
@click.option(
    "--checkpoint", type=PATH, help="Another model of the same family to evaluate.  [default: base.checkpoint]"
)
@click.option("--weights", help="Weight set of --checkpoint.  [default: base.weights]")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Disjoint seed blocks; reports each value, mean, std and minimum.",
)
@config_options
def evaluate(on: OnConfig, checkpoint: Path | None, weights: str | None, repeats: int) -> None:
    """Evaluate one model under the config's [report] protocol."""
    replaced = list(on.overrides)
    if checkpoint is not None:
        replaced.append(f"base.checkpoint={json.dumps(str(checkpoint))}")
    if weights is not None:
        replaced.append(f"base.weights={json.dumps(weights)}")
    replace(on, overrides=tuple(replaced)).do(lambda e, folder, ranks: evaluate_base(Run(e, folder, ranks), repeats))


@main.command()
@config_options
def train(on: OnConfig) -> None:
    """Train a base model of your own from [model], [data] and [train]; writes model.safetensors."""
    on.do(train_base)


@main.command("train-autoencoder")
@config_options
def autoencoder(on: OnConfig) -> None:
    """Train a small tokeniser or latent autoencoder from [autoencoder] and [data]; reports the held-out PSNR."""
    on.do(train_autoencoder)


for group in (files.commands, fid.commands):
    for command in group:
        main.add_command(command)
