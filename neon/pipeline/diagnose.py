"""`neon diagnose`: before any search, does Neon help here and in which direction?

The synthetic gradients are those that the fine-tune follows: of what it trains, in training mode. Those on real images
say what becomes of the model that is sampled: in evaluation mode. A base that was trained with dropout is not at the
optimum of evaluation mode; the way there is in the gradients on all images, and would count as alignment if dropout
were off in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from neon.checkpoints import checkpoint
from neon.config_table import to_table
from neon.family import Family
from neon.pipeline.experiment import Data
from neon.pipeline.run import DIAGNOSIS, Run
from neon.runtime.distributed import World
from neon.runtime.progress import progress, say
from neon.sampling.options import Synth
from neon.seeds import at_random, derived_seed, global_seed
from neon.store import records
from neon.store.shards import Corpus
from neon.training.alignment import Alignment, Gradients, align, inner, num_gradients
from neon.training.encoding import encoded
from neon.training.loop import let_train, snapshots
from neon.training.recipe import Training
from neon.training.schedules import lr_at
from neon.training.step_data import step_data


@dataclass(frozen=True)
class Chosen:
    """Some images of a corpus. indices: (N,) int64."""

    corpus: Corpus
    indices: Tensor

    @property
    def labels(self) -> Tensor | None:
        return None if self.corpus.labels is None else self.corpus.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Sequence[int], /) -> Tensor:
        return self.corpus.read(self.indices[torch.as_tensor(indices)].tolist())


def chosen(corpus: Corpus, count: int, seed: int) -> Chosen:
    """`count` images at random."""
    return Chosen(corpus, at_random(len(corpus), count, seed))


def diagnose(run: Run, num_images: int) -> dict[str, object]:
    """The alignment of real and synthetic gradients at the base, from `num_images` of each, as JSON with a sentence;
    also written to the folder, for the page of its run.

    Raises ValueError if the config names no real images, or for fewer than 4 batches of them.
    """
    if run.config.data is None:
        raise ValueError(
            "neon diagnose compares gradients on real and on synthetic images: name real ones, best such that the base "
            "was not trained on, with [data] path (or --set data.path=FILE)"
        )
    if run.world.size > 1:
        raise ValueError(f"neon diagnose runs on one process, {run.world.size} were started")
    recipe = run.config.need("finetune", Training)
    found, count = _align(run, run.config.data, recipe, num_images)
    say(run.world, found.sentence())
    held_out = "" if run.config.train is None else "; if the base was trained on them, held-out ones say more"
    result = {
        "sentence": found.sentence(),
        "sign_of_w": found.sign,
        "best_w_by_loss": found.best_w,
        **to_table(found),
        "real_images": f"{count} images of {run.config.data.path}{held_out}",
    }
    records.write_json(records.sealed(result), run.folder / DIAGNOSIS)
    return result


def _align(run: Run, data: Data, recipe: Training, num_images: int) -> tuple[Alignment, int]:
    """And how many images of each kind it took: whole batches."""
    real_images = data.open()
    data.check_classes(real_images, run.num_classes)
    synthetic: Corpus = run.synth()
    num_batches = min(num_images, len(synthetic), len(real_images)) // recipe.batch
    if num_batches < 4:
        raise ValueError(
            f"the interval needs at least 4 batches of {recipe.batch} (finetune.batch); there are {len(real_images)} "
            f"real and {len(synthetic)} synthetic images, --num-images is {num_images}"
        )
    count = num_batches * recipe.batch
    folder, manifest = run.folder / "diagnose", records.read_manifest(run.folder / "synth")
    real: Corpus = chosen(real_images, count, seed=1)
    stored = run.config.need("synth", Synth).store == "images"
    batch = run.sampling.batch
    if stored:
        synthetic = encoded(
            run.family,
            chosen(synthetic, count, 2),
            folder / f"synthetic-{count}",
            {"synth": manifest},
            run.world,
            batch,
        )
    key = {**to_table(data), "path": str(Path(data.path).resolve()), "count": count}
    real = encoded(run.family, real, folder / f"real-{records.key_of(key)[:16]}", key, run.world, batch)
    say(run.world, f"diagnose: {count} real and {count} synthetic images in batches of {recipe.batch}")
    model = run.family.build({**run.family.arch_of(run.base), **recipe.arch})
    run.base.load_into(model)
    model = run.family.adapted(model, recipe.objective).to(run.world.device)
    let_train(run.family, model)
    bar = progress(total=num_gradients(num_batches), desc="diagnose", unit="batches", world=run.world)
    with closing(bar):
        found = align(
            gradients(run.family, model, real, recipe, "real", run.world, bar.update, is_training=False),
            gradients(run.family, model, synthetic, recipe, "synthetic", run.world, bar.update, is_training=True),
            num_batches,
            beta2=recipe.betas[1],
            eps=recipe.eps,
            alpha=lambda direction: fine_tune_length(run.folder, recipe, model, direction),
        )
    return found, count


def gradients(
    family: Family,
    model: torch.nn.Module,
    corpus: Corpus,
    recipe: Training,
    name: str,
    world: World,
    done: Callable[[int], None],
    *,
    is_training: bool,
) -> Gradients:
    """Batch k's gradient, with draws of its own for each corpus: shared ones would make the gradients look aligned.

    done: called with 1 after every batch. is_training: the model's mode.
    """
    own = replace(recipe, seed=derived_seed(recipe.seed, "diagnose", name) % 2**31)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    state: dict[str, Tensor] = {**parameters, **dict(model.named_buffers())}  # training mode may move a buffer
    base = {n: value.detach().clone() for n, value in state.items()}

    def gradient(k: int, offset: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        model.train(is_training)
        with torch.no_grad():
            for n, value in state.items():
                value.copy_(base[n] if offset is None or n not in offset else base[n] + offset[n])
        data = step_data(family, own, k, corpus, world)
        labels = None if data.labels is None else data.labels.to(world.device)
        draws = {n: value.to(world.device) for n, value in data.draws.items()}
        with global_seed(derived_seed(own.seed, "dropout", k), world.device):  # asked again, the same masks
            losses = family.loss(model, data.codes.to(world.device), labels, draws, own.objective)
        found = torch.autograd.grad(losses.sum() / own.batch, list(parameters.values()), materialize_grads=True)
        done(1)
        return dict(zip(parameters, found, strict=True))

    return gradient


def fine_tune_length(folder: Path, recipe: Training, model: torch.nn.Module, direction: Mapping[str, Tensor]) -> float:
    """How far the fine-tune goes along -direction: by its last snapshot if there is one, else the sum of its rates. (A
    low-rank fine-tune's snapshots are the whole weights: its matrices are not in them.)"""
    shots = snapshots(folder / "finetune")
    tuned = checkpoint.read(shots[-1], weights="any").tensors if shots else {}
    if not tuned.keys() >= direction.keys():
        return sum(lr_at(recipe, images) for images in range(0, recipe.images, recipe.batch))
    base = {name: p.detach() for name, p in model.named_parameters() if name in direction}
    moved = {name: tuned[name].to(base[name]) - base[name] for name in direction}
    return -inner(moved, direction) / inner(direction, direction)
