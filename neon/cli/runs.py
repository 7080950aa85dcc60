"""Verbs on a config: run and its stages, eval, train, train-autoencoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from neon.cli.options import PATH, RANK_OPTIONS, gathered
from neon.config_table import to_table

if TYPE_CHECKING:
    from neon.pipeline.experiment import Experiment
    from neon.pipeline.needs import Part
    from neon.pipeline.trackers import Kind
    from neon.runtime.distributed import World


@dataclass(frozen=True)
class OnConfig:
    """What every verb on a config is asked: CONFIG and `config_options`."""

    config: Path
    overrides: tuple[str, ...]
    out: Path | None
    device: str | None
    timeout: float
    dry_run: bool
    log: Kind | None
    as_json: bool

    def do(self, work: Callable[[Experiment, Path, World], dict[str, object]], *, reads: Sequence[Part]) -> None:
        """Load and check the config, own the run's folder, do the work on all ranks, print the result. The
        verdict comes last: it is for people.

        reads: the parts of the config whose files the work needs; all that are missing are said before it begins.
        """
        from neon.pipeline.experiment import load
        from neon.pipeline.needs import check_all_there
        from neon.pipeline.trackers import tracked
        from neon.runtime.distributed import world
        from neon.runtime.interrupt import told_how_to_go_on
        from neon.runtime.progress import say
        from neon.store.files import folder_lock

        experiment = load(self.config, self.overrides)
        folder = self.out or Path("runs") / self.config.stem
        if self.as_json and not self.dry_run:
            raise click.UsageError("--json belongs to --dry-run")
        if self.dry_run:
            self.show_plan(experiment, folder, reads)
            return
        check_all_there(experiment, reads, self.config)
        with world(self.device, self.timeout) as ranks, told_how_to_go_on(ranks):
            if ranks.is_main:
                with folder_lock(folder), tracked(self.log, folder):
                    result = work(experiment, folder, ranks)
                    ranks.barrier()
                click.echo(json.dumps(result))
                if "verdict" in result:
                    say(ranks, str(result["verdict"]))
            else:
                work(experiment, folder, ranks)
                ranks.barrier()

    def show_plan(self, experiment: Experiment, folder: Path, reads: Sequence[Part]) -> None:
        """What the run would do, cost and lack; exit code 1 if a file is missing."""
        from neon.pipeline import needs, plan
        from neon.runtime.distributed import world

        absent = needs.missing(experiment, reads, self.config)
        with world(self.device, self.timeout) as ranks:
            if not ranks.is_main:
                return
            found = plan.make_plan(experiment, folder, ranks.device, ranks.size, absent)
        if self.as_json:
            click.echo(json.dumps({**to_table(found), "config": to_table(experiment)}))
        else:
            click.echo(plan.text(found))
        if absent:
            raise SystemExit(1)


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Replace a value of the config; repeatable.",
)
config_options = gathered(
    OnConfig,
    "on",
    [
        click.argument("config", type=PATH),
        set_option,
        click.option("--out", type=PATH, help="Folder of the run.  [default: runs/NAME-OF-CONFIG]"),
        *RANK_OPTIONS,
        click.option(
            "--log", type=click.Choice(["tensorboard", "wandb"]), help="Send losses and scores to a tracker as well."
        ),
        click.option(
            "--dry-run",
            is_flag=True,
            help="Check the config, measure a few images, print what the run would do, cost and lack, and stop.",
        ),
        click.option("--json", "as_json", is_flag=True, help="The --dry-run as JSON, with the resolved config."),
    ],
)


@click.command()
@click.option(
    "--synth-seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Synthetic sets; with several, each gets a folder of its own and the spread over them is reported.",
)
@config_options
def run(on: OnConfig, synth_seeds: int) -> None:
    """Everything: synth, finetune, select w, report on held-out noise, merged file, one page.

    Prints a summary; everything else lies in the folder's result.json.
    """
    from neon.pipeline.experiment import load
    from neon.pipeline.repeat import overrides_of, repeated
    from neon.pipeline.run import Run
    from neon.report.result import summary

    def work(experiment: Experiment, folder: Path, ranks: World) -> dict[str, object]:
        if synth_seeds == 1:
            return summary(Run(experiment, folder, ranks).all(), folder)

        def numbered(number: int) -> Experiment:
            return load(on.config, [*on.overrides, *overrides_of(experiment, number)])

        return repeated(numbered, synth_seeds, folder, ranks)

    on.do(work, reads=["base", "autoencoder", "report"])


@click.command()
@click.argument("config", type=PATH)
@set_option
@click.option("--device", help="cpu, cuda, cuda:1 or mps.  [default: CUDA if there is one]")
def check(config: Path, overrides: tuple[str, ...], device: str | None) -> None:
    """Try a config and its family on a few images, in seconds: missing files, shapes, ranges, batch independence, same
    seed same image, loss per image, save and load.

    Start here with a model of your own. Exit code 1 if anything is wrong.
    """
    from neon.pipeline import check as trial
    from neon.pipeline.experiment import load
    from neon.runtime.distributed import world

    experiment = load(config, overrides)
    with world(device) as ranks:
        found = []
        for finding in trial.check(experiment, config, ranks.device):
            kind = "warn" if finding.is_caution else "ok  " if finding.is_ok else "FAIL"
            click.echo(f"{kind}  {finding.name}: {finding.text}", err=True)
            found.append(to_table(finding))
    failed = [one for one in found if not one["is_ok"]]
    click.echo(json.dumps({"is_ok": not failed, "checks": found}))
    if failed:
        raise SystemExit(1)


@click.command()
@config_options
def synth(on: OnConfig) -> None:
    """Stage 1: sample the synthetic set S with the base model's ordinary sampler."""
    from neon.pipeline.run import Run

    def work(experiment: Experiment, folder: Path, ranks: World) -> dict[str, object]:
        found = Run(experiment, folder, ranks).synth()
        return {"num_images": len(found), "folder": str(folder / "synth")}

    on.do(work, reads=["base", "autoencoder"])


@click.command()
@config_options
def finetune(on: OnConfig) -> None:
    """Stage 2: fine-tune the base briefly on S (makes S first if it is not there)."""
    from neon.pipeline.run import Run

    def work(experiment: Experiment, folder: Path, ranks: World) -> dict[str, object]:
        return {"snapshots": [str(path) for path in Run(experiment, folder, ranks).finetune()]}

    on.do(work, reads=["base", "autoencoder"])


@click.command("search")
@config_options
def select(on: OnConfig) -> None:
    """Stage 3: find (snapshot, w, cfg_scale) on the selection seeds, with as few images as the decision needs."""
    from neon.pipeline.run import Run
    from neon.report.result import selection

    def work(experiment: Experiment, folder: Path, ranks: World) -> dict[str, object]:
        run = Run(experiment, folder, ranks)
        run.check_finetuned()
        choice = run.select()
        return {"chosen": to_table(choice.point), **selection(choice)}

    on.do(work, reads=["base", "autoencoder", "report"])


@click.command()
@click.option(
    "--num-images",
    type=click.IntRange(min=4),
    default=2_000,
    show_default=True,
    help="Real images, and synthetic ones, whose gradients are compared.",
)
@config_options
def diagnose(on: OnConfig, num_images: int) -> None:
    """Before any search: does Neon help here, and with w > 0 or w < 0? Needs the real images of [data]."""
    from neon.pipeline.diagnose import diagnose as diagnosed
    from neon.pipeline.run import Run

    on.do(lambda e, folder, ranks: diagnosed(Run(e, folder, ranks), num_images), reads=["base", "autoencoder", "data"])


@click.command("eval")
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
    from neon.pipeline.evaluate_base import evaluate_base
    from neon.pipeline.run import Run

    replaced = list(on.overrides)
    if checkpoint is not None:
        replaced.append(f"base.checkpoint={json.dumps(str(checkpoint))}")
    if weights is not None:
        replaced.append(f"base.weights={json.dumps(weights)}")
    replace(on, overrides=tuple(replaced)).do(
        lambda e, folder, ranks: evaluate_base(Run(e, folder, ranks), repeats), reads=["base", "autoencoder", "report"]
    )


@click.command()
@config_options
def train(on: OnConfig) -> None:
    """Train a base model of your own from [model], [data] and [train]; writes model.safetensors."""
    from neon.pipeline.train_base import train_base

    on.do(train_base, reads=["autoencoder", "data"])


@click.command("train-autoencoder")
@config_options
def autoencoder(on: OnConfig) -> None:
    """Train a small tokeniser or latent autoencoder from [autoencoder] and [data]; reports the held-out PSNR."""
    from neon.pipeline.train_autoencoder import train_autoencoder

    on.do(train_autoencoder, reads=["data"])


commands: Sequence[click.Command] = (check, run, synth, finetune, select, diagnose, evaluate, train, autoencoder)
