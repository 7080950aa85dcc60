"""The steps of `neon train` and of the short fine-tune on S: data in, updates, snapshots, log, resume.

Data order and every random number of step k are pure functions of (seed, k), made for the whole global batch; a rank
reads the codes of its own share. The update does not depend on the number of GPUs or accumulation rounds, and a resumed
run repeats it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import cast

import torch
from torch import nn

from neon.family import Trainable
from neon.runtime.distributed import World
from neon.runtime.progress import progress, say
from neon.seeds import derived_seed
from neon.store import files, records
from neon.store.shards import Corpus
from neon.training.recipe import Training
from neon.training.schedules import lr_at
from neon.training.step_data import OneStepAhead, StepData, step_data
from neon.training.trainer import State, Trainer


def train_step(trainer: Trainer, corpus: Corpus, data: StepData | None = None) -> float:
    """One update on the global batch of the trainer's next step (data: where it is at hand already); returns its mean
    loss."""
    recipe, world, device = trainer.recipe, trainer.world, trainer.world.device
    trainer.model.train()
    if data is None:
        data = step_data(trainer.family, recipe, trainer.step, corpus, world)
    torch.manual_seed(
        derived_seed(recipe.seed, "dropout", trainer.step, world.rank)
    )  # dropout masks inside networks only
    total = torch.zeros((), dtype=torch.float64)
    share = len(data.codes)
    size = recipe.micro_batch or max(share, 1)
    for part in (slice(start, start + size) for start in range(0, share, size)):
        part_labels = None if data.labels is None else data.labels[part].to(device)
        part_draws = {name: value[part].to(device) for name, value in data.draws.items()}
        total += trainer.backward(data.codes[part].to(device), part_labels, part_draws, recipe.batch)
    for parameter in trainer.model.parameters():  # a rank without images still takes part in the sum
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    world.sum([total])
    trainer.update(total.item())
    return total.item()


def train(
    family: Trainable,
    model: nn.Module,
    corpus: Corpus,
    recipe: Training,
    folder: Path,
    identity: Mapping[str, object],
    write_snapshot: Callable[[Trainer, Path], None],
    world: World,
) -> list[Path]:
    """Train to the recipe's budget; returns the snapshots in the order of their images.

    folder: receives state.pt (exact resume), snapshot-IMAGES.safetensors and log.jsonl.
    identity: what must not change under a half-done run; a difference is an error that names the key.
    Raises FloatingPointError at the first loss, gradient or snapshot that is not finite.
    """
    if len(corpus) < 1:
        raise ValueError("there is nothing to train on: the set holds no images")
    folder.mkdir(parents=True, exist_ok=True)
    model.to(world.device)
    let_train(family, model)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    trainer = Trainer(family, model, recipe, world)
    saver = records.Saver(folder / "state.pt")
    written: dict[str, str] = {}
    if saver.path.is_file():
        state = read_progress(folder, identity, world.device)
        trainer.restore(cast("State", state))
        written = dict(state.get("snapshots", {}))
        say(world, f"train: found {trainer.images_seen:,} of {recipe.images:,} images in {folder}, going on")
    if world.is_main:
        _truncate_log(folder, trainer.step)
    world.barrier()
    bar = progress(total=recipe.images, initial=trainer.images_seen, desc="train", unit="img", world=world)
    with closing(OneStepAhead(family, recipe, corpus, world)) as ahead:
        while trainer.images_seen < recipe.images:
            before = trainer.images_seen
            loss = train_step(trainer, corpus, ahead.take(trainer.step))
            bar.update(trainer.images_seen - before, note=f"loss {loss:.4g}")
            is_done = trainer.images_seen >= recipe.images
            is_due = is_done or (
                recipe.snapshot_images is not None
                and before // recipe.snapshot_images != trainer.images_seen // recipe.snapshot_images
            )
            if world.is_main:
                _log(folder, trainer, loss, is_due)
                if is_due:
                    trainer.check_finite()
                    path = folder / f"snapshot-{trainer.images_seen:012d}.safetensors"
                    write_snapshot(trainer, path)
                    written[path.name] = files.sha256_of(path)
                if is_due or saver.is_due:
                    saver.save({**trainer.state(), "identity": dict(identity), "snapshots": written})
    bar.close()
    world.barrier()
    return snapshots(folder)


def let_train(family: Trainable, model: nn.Module) -> None:
    """Have those parameters of a network, as `build` gave it, require a gradient that training changes."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and family.trains(name, parameter))


def read_progress(folder: Path, identity: Mapping[str, object], device: torch.device | str = "cpu") -> dict:
    """The saved state of a training folder: of this recipe, undamaged, and with its snapshots as they were written.

    Raises ValueError that names the file or the key.
    """
    advice = f"Delete {folder} and run the same command again: this training is made again, everything else is kept"
    try:
        state = records.read_state(folder / "state.pt", device)
        records.check_same(state["identity"], identity, folder)
        for name, sha256 in state.get("snapshots", {}).items():  # states of earlier versions have none
            if not (folder / name).is_file():
                raise records.DamagedError(f"{folder / name}: missing")
            if files.sha256_of(folder / name) != sha256:
                raise records.DamagedError(f"{folder / name}: damaged, its content is not what was written")
    except records.DamagedError as error:
        raise records.DamagedError(f"{error}. {advice}") from error
    return state


def is_finished(folder: Path, recipe: Training, identity: Mapping[str, object]) -> bool:
    """Whether a training of this recipe has come to its end. The state is written after the last snapshot: without it,
    the training is not finished. Raises ValueError as `read_progress`."""
    if not (folder / "state.pt").is_file():
        return False
    return int(read_progress(folder, identity)["images_seen"]) >= recipe.images


def snapshots(folder: Path) -> list[Path]:
    """The snapshots of a training folder, by images seen."""
    return sorted(folder.glob("snapshot-*.safetensors"))


def _truncate_log(folder: Path, step: int) -> None:
    """Drop the lines of updates that a killed run made after its last saved state: they are made again."""
    log = folder / "log.jsonl"
    if log.is_file():
        records.write_lines(log, [line for line in records.read_lines(log) if line["step"] <= step])


def _log(folder: Path, trainer: Trainer, loss: float, is_due: bool) -> None:
    if is_due or trainer.step % 50 == 0 or trainer.step == 1:
        line = {
            "step": trainer.step,
            "images": trainer.images_seen,
            "loss": loss,
            "lr": lr_at(trainer.recipe, trainer.images_seen - trainer.recipe.batch),
        }
        records.append_line(folder / "log.jsonl", line)
