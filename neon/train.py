"""One training loop for `neon train` and the short fine-tune on S.

Data order and every random number of step k are pure functions of (seed, k), made for the whole global batch and sliced
per rank: the update does not depend on the number of GPUs or accumulation rounds, and a resumed run repeats it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from neon import files, records
from neon.config import Training
from neon.distributed import World
from neon.family import Draws, Trainable
from neon.precision import arithmetic
from neon.progress import progress
from neon.seeds import SharedRng, derived_seed
from neon.shards import Corpus


@dataclass
class Trainer:
    """Model, optimiser and moving average of a run. One `backward` per accumulation round, then one `update`."""

    family: Trainable
    model: nn.Module
    recipe: Training
    world: World
    images_seen: int = 0
    step: int = 0
    ema: dict[str, Tensor] | None = None
    last_grad_norm: float = field(default=math.nan, init=False)

    def __post_init__(self) -> None:
        decay: list[nn.Parameter] = []
        constant: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            (decay if self.family.decays(name, parameter) else constant).append(parameter)
        groups = [{"params": constant, "weight_decay": 0.0}, {"params": decay, "weight_decay": self.recipe.weight_decay}]
        kind = torch.optim.AdamW if self.recipe.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = kind([g for g in groups if g["params"]], lr=self.recipe.lr, betas=self.recipe.betas, eps=self.recipe.eps)
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.recipe.precision == "fp16")
        if self.recipe.has_ema and self.ema is None:
            self.ema = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def backward(self, codes: Tensor, labels: Tensor | None, draws: Draws, global_batch: int) -> float:
        """Add the gradient of sum(loss) / global_batch over these images; returns that part of the loss."""
        device, precision = self.world.device, self.recipe.precision
        with arithmetic(device, precision):
            losses = self.family.loss(self.model, codes, labels, draws, self.recipe.objective)
            with torch.autocast(device.type, enabled=False):  # gradients have the dtypes of the forward pass
                loss = losses.sum() / global_batch
                self.scaler.scale(loss * self.recipe.loss_scale).backward()
        return loss.item()

    def update(self, loss: float) -> None:
        """Sum the gradients over ranks, clean or clip them, set the rate, step, average. Raises at a non-finite loss."""
        lr = lr_at(self.recipe, self.images_seen)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.world.sum(gradients)
        self.scaler.unscale_(self.optimizer)
        self._finish_gradients(gradients, loss, lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        self.step += 1
        self.images_seen += self.recipe.batch

    def _finish_gradients(self, gradients: list[Tensor], loss: float, lr: float) -> None:
        recipe = self.recipe
        if recipe.clean_gradients:
            for gradient in gradients:
                torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)
        if recipe.max_grad_norm is not None:
            self.last_grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm))
        if not math.isfinite(loss):
            norm = torch.stack([g.double().norm() for g in gradients]).norm().item() if gradients else math.nan
            raise FloatingPointError(
                f"the loss is {loss} at step {self.step} ({self.images_seen} images seen; lr {lr:.3g}, gradient norm {norm:.3g}). "
                "Nothing after the last snapshot is used; lower lr, set max_grad_norm, or use precision = 'fp32' or 'bf16'"
            )

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is None:
            return
        beta = ema_beta(self.recipe, self.images_seen, self.step)
        parameters = dict(self.model.named_parameters())
        torch._foreach_lerp_(list(self.ema.values()), [parameters[name].detach() for name in self.ema], 1 - beta)

    def weights(self) -> dict[str, Tensor]:
        """The state dict that is published: the moving average where there is one, buffers from the model."""
        state = self.model.state_dict()
        return state if self.ema is None else {name: self.ema.get(name, value) for name, value in state.items()}

    def state(self) -> dict[str, object]:
        """Exactly what resume needs."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "images_seen": self.images_seen,
            "step": self.step,
        }

    def restore(self, state: Mapping[str, object]) -> None:
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.scaler.load_state_dict(state["scaler"])  # type: ignore[arg-type]
        self.images_seen, self.step = int(state["images_seen"]), int(state["step"])  # type: ignore[call-overload]
        if self.ema is not None:
            for name, value in state["ema"].items():  # type: ignore[attr-defined]
                self.ema[name].copy_(value)


def lr_at(recipe: Training, images_seen: int) -> float:
    """The rate of the update made after `images_seen` images: linear ramp from 0, constant, cosine to 0 at the end."""
    rate = recipe.lr
    if recipe.lr_ramp_images:
        rate *= min(images_seen / recipe.lr_ramp_images, 1.0)
    if recipe.lr_cosine_images:
        remaining = (recipe.images - images_seen) / recipe.lr_cosine_images
        rate *= 0.5 - 0.5 * math.cos(math.pi * min(max(remaining, 0.0), 1.0))
    return rate


def ema_beta(recipe: Training, images_seen: int, step: int) -> float:
    """Weight of the old average in the update made after `images_seen` images (`step` updates)."""
    if recipe.ema_decay is not None:
        return recipe.ema_decay
    if recipe.ema_power is not None:  # Karras et al. 2024, eq. 1, with t = step + 1
        return (1 - 1 / (step + 1)) ** (recipe.ema_power + 1)
    assert recipe.ema_halflife_images is not None
    halflife = recipe.ema_halflife_images
    if recipe.ema_rampup_ratio is not None:
        halflife = min(halflife, images_seen * recipe.ema_rampup_ratio)
    return 0.5 ** (recipe.batch / max(halflife, 1e-8))


def batch_indices(seed: int, step: int, batch: int, num_images: int) -> Tensor:
    """Indices of the global batch of a step: epochs are seeded permutations, batches run across their borders."""
    positions = torch.arange(step * batch, (step + 1) * batch)
    epochs = positions // num_images
    indices = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch)))
        chosen = epochs == epoch
        indices[chosen] = order[positions[chosen] % num_images]
    return indices


def step_draws(family: Trainable, recipe: Training, step: int, codes: Tensor, labels: Tensor | None) -> Draws:
    """Every random number of a step of the global batch, drawn on the CPU."""
    generator = torch.Generator().manual_seed(derived_seed(recipe.seed, "draws", step))
    return family.draw(SharedRng(len(codes), generator), codes, labels, recipe.objective)


def train_step(trainer: Trainer, corpus: Corpus) -> float:
    """One update on the global batch of the trainer's next step; returns its mean loss."""
    recipe, world, device = trainer.recipe, trainer.world, trainer.world.device
    trainer.model.train()
    indices = batch_indices(recipe.seed, trainer.step, recipe.batch, len(corpus))
    codes = corpus.read(indices.tolist())
    labels = None if corpus.labels is None else corpus.labels[indices]
    draws = step_draws(trainer.family, recipe, trainer.step, codes, labels)
    mine = _share(recipe, world, trainer.family.group(recipe.objective))
    torch.manual_seed(derived_seed(recipe.seed, "dropout", trainer.step, world.rank))  # dropout masks inside networks only
    total = torch.zeros((), dtype=torch.float64)
    for part in mine:
        part_labels = None if labels is None else labels[part].to(device)
        part_draws = {name: value[part].to(device) for name, value in draws.items()}
        total += trainer.backward(codes[part].to(device), part_labels, part_draws, recipe.batch)
    for parameter in trainer.model.parameters():  # a rank without images still takes part in the sum
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    world.sum([total])
    trainer.update(total.item())
    return total.item()


def _share(recipe: Training, world: World, group: int) -> list[slice]:
    """This rank's slices of the global batch, at most micro_batch images each, in whole groups."""
    if recipe.batch % group or (recipe.micro_batch or group) % group:
        raise ValueError(f"batch and micro_batch must be multiples of {group}, the images whose loss is computed together")
    start, stop = (recipe.batch // group * r // world.size * group for r in (world.rank, world.rank + 1))
    size = recipe.micro_batch or max(stop - start, 1)
    return [slice(a, min(a + size, stop)) for a in range(start, stop, size)]


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
    Raises FloatingPointError at the first non-finite loss.
    """
    if len(corpus) < 1:
        raise ValueError("there is nothing to train on: the set holds no images")
    folder.mkdir(parents=True, exist_ok=True)
    model.to(world.device).requires_grad_(True)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    trainer = Trainer(family, model, recipe, world)
    saver = records.Saver(folder / "state.pt")
    if saver.path.is_file():
        state = torch.load(saver.path, map_location=world.device, weights_only=True)
        records.check_same(state["identity"], identity, folder)
        trainer.restore(state)
    if world.is_main:
        _truncate_log(folder, trainer.step)
    world.barrier()
    bar = progress(total=recipe.images, initial=trainer.images_seen, desc="train", unit="img", world=world)
    while trainer.images_seen < recipe.images:
        before = trainer.images_seen
        loss = train_step(trainer, corpus)
        bar.update(min(trainer.images_seen, recipe.images) - before)
        bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        is_done = trainer.images_seen >= recipe.images
        is_due = is_done or (
            recipe.snapshot_images is not None and before // recipe.snapshot_images != trainer.images_seen // recipe.snapshot_images
        )
        if world.is_main:
            _log(folder, trainer, loss, is_due)
            if is_due:
                write_snapshot(trainer, folder / f"snapshot-{trainer.images_seen:012d}.safetensors")
            if is_due or saver.is_due:
                saver.save({**trainer.state(), "identity": dict(identity)})
    bar.close()
    world.barrier()
    return snapshots(folder)


def snapshots(folder: Path) -> list[Path]:
    """The snapshots of a training folder, by images seen."""
    return sorted(folder.glob("snapshot-*.safetensors"))


def _truncate_log(folder: Path, step: int) -> None:
    """Drop the lines of updates that a killed run made after its last saved state: they are made again."""
    log = folder / "log.jsonl"
    if log.is_file():
        lines = [line for line in records.read_lines(log) if line["step"] <= step]
        files.write_text(log, "".join(json.dumps(line) + "\n" for line in lines))


def _log(folder: Path, trainer: Trainer, loss: float, is_due: bool) -> None:
    if is_due or trainer.step % 50 == 0 or trainer.step == 1:
        line = {
            "step": trainer.step,
            "images": trainer.images_seen,
            "loss": loss,
            "lr": lr_at(trainer.recipe, trainer.images_seen - trainer.recipe.batch),
        }
        records.append_line(folder / "log.jsonl", line)
