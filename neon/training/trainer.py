"""Model, optimiser and moving average: what one update does to them, and the state that resume needs. The steps are
made in `loop.py`."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from neon import first_batch
from neon.family import Draws, Trainable
from neon.merge import ties_of
from neon.runtime.distributed import World
from neon.runtime.precision import arithmetic
from neon.training.recipe import Training
from neon.training.schedules import ema_beta, lr_at

LOG = logging.getLogger(__name__)


class State(TypedDict):
    """Exactly what resume needs."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    images_seen: int
    step: int


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
            if parameter.requires_grad:
                (decay if self.family.decays(name, parameter) else constant).append(parameter)
        groups = [
            {"params": constant, "weight_decay": 0.0},
            {"params": decay, "weight_decay": self.recipe.weight_decay},
        ]
        kind = torch.optim.AdamW if self.recipe.optimizer == "adamw" else torch.optim.Adam
        if not decay + constant:
            raise ValueError(
                f"there is nothing to train: {type(self.family).__name__}.trains is false for every parameter"
            )
        coarse = [p for p in constant + decay if p.dtype in (torch.float16, torch.bfloat16)]
        if coarse and self.world.is_main:
            LOG.warning(
                "%d of %d trained parameters are %s: an update below about 1/%d of a weight is lost. Give the model in "
                "float32; precision = 'bf16' then computes in bfloat16",
                len(coarse),
                len(constant + decay),
                str(coarse[0].dtype).removeprefix("torch."),
                round(2 / torch.finfo(coarse[0].dtype).eps),
            )
        self.optimizer = kind(
            [g for g in groups if g["params"]], lr=self.recipe.lr, betas=self.recipe.betas, eps=self.recipe.eps
        )
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.recipe.precision == "fp16")
        if self.recipe.has_ema and self.ema is None:
            trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
            self.ema = {name: parameter.detach().clone() for name, parameter in trained.items()}

    def backward(self, codes: Tensor, labels: Tensor | None, draws: Draws, global_batch: int) -> float:
        """Add the gradient of sum(loss) / global_batch over these images; returns that part of the loss."""
        device, precision = self.world.device, self.recipe.precision
        with arithmetic(device, precision):
            returned = self.family.loss(self.model, codes, labels, draws, self.recipe.objective)
            losses = first_batch.losses(type(self.family).__name__, returned, len(codes))
            with torch.autocast(device.type, enabled=False):  # gradients have the dtypes of the forward pass
                loss = losses.sum() / global_batch
                try:
                    self.scaler.scale(loss * self.recipe.loss_scale).backward()
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # the line of the loss that is at fault has been left by now
                    raise ValueError(
                        f"the loss of {type(self.family).__name__}.loss cannot be differentiated: {error}"
                    ) from error
        return loss.item()

    def update(self, loss: float) -> None:
        """Sum the gradients over ranks, clean or clip them, set the rate, step, average. Raises at a non-finite
        loss."""
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
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
        else:
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
        self.last_grad_norm = float(norm)
        # fp16's scaler leaves out an update with infinite gradients by itself, and lowers its scale
        is_lost = not (self.scaler.is_enabled() or math.isfinite(self.last_grad_norm))
        if not math.isfinite(loss) or is_lost:
            raise FloatingPointError(
                f"the loss is {loss} at step {self.step} ({self.images_seen} images seen; lr {lr:.3g}, gradient norm "
                f"{self.last_grad_norm:.3g}). "
                "Nothing after the last snapshot is used; lower lr, set max_grad_norm, or use precision = 'fp32' "
                "or 'bf16'"
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
        if self.ema is None:
            return state
        ties = ties_of(self.model)
        return {name: self.ema.get(ties.get(name, name), value) for name, value in state.items()}

    def check_finite(self) -> None:
        """Raise FloatingPointError naming the first parameter that may not be published. (Infinities of buffers are
        masks.)"""
        weights = self.weights()
        for name, _ in self.model.named_parameters():
            if not torch.isfinite(weights[name]).all():
                raise FloatingPointError(
                    f"{name} holds NaN or infinities after step {self.step} ({self.images_seen} images seen): no "
                    "snapshot is written. Lower lr, or set max_grad_norm"
                )

    def state(self) -> State:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "images_seen": self.images_seen,
            "step": self.step,
        }

    def restore(self, state: State) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.images_seen, self.step = state["images_seen"], state["step"]
        if self.ema is not None:
            assert state["ema"] is not None  # the state is of the same recipe
            for name, value in state["ema"].items():
                self.ema[name].copy_(value)
