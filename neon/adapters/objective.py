"""The training loss of a pipeline's scheduler: what x_t is, what the network is shown, what it should answer."""

# B images, T training times

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


class Forward(Protocol):
    """How images become noisy, and what the network predicts."""

    def noised(self, x: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, the time as the network takes it (B,), the target) of images x and u in [0, 1) (B,)."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """x_t = sqrt(a) x + sqrt(1 - a) noise with the a = alpha_bar (T,) of a DDPM's schedule (arXiv 2006.11239, eq. 4).

    The same for every scheduler that samples from such a model (DDIM, PNDM, DPM-Solver, Euler, ...).
    """

    alpha_bar: Tensor
    prediction: Literal["epsilon", "v_prediction", "sample"]

    def noised(self, x: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = (u * len(self.alpha_bar)).long()
        a = self.alpha_bar.to(x)[t].view(-1, *[1] * (x.ndim - 1))
        x_t = a.sqrt() * x + (1 - a).sqrt() * noise
        if self.prediction == "epsilon":
            return x_t, t, noise
        if self.prediction == "sample":
            return x_t, t, x
        return x_t, t, a.sqrt() * noise - (1 - a).sqrt() * x  # Salimans and Ho 2022 (arXiv 2202.00512), appendix D


@dataclass(frozen=True)
class FlowMatching:
    """x_t = (1 - s) x + s noise, target noise - x (arXiv 2210.02747); s and the network's time from the scheduler."""

    sigmas: Tensor
    times: Tensor

    def noised(self, x: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        i = (u * len(self.sigmas)).long()
        s = self.sigmas.to(x)[i].view(-1, *[1] * (x.ndim - 1))
        return (1 - s) * x + s * noise, self.times.to(x)[i], noise - x


def forward_of(scheduler: object) -> Forward:
    """How the model behind a diffusers scheduler was trained. Raises ValueError for one of another kind."""
    name, config = type(scheduler).__name__, scheduler.config  # type: ignore[attr-defined]  # every scheduler has it
    fresh = type(scheduler).from_config(config)  # type: ignore[attr-defined]  # sampling changes a scheduler's tables
    if "FlowMatch" in name:
        return FlowMatching(
            torch.as_tensor(fresh.sigmas[: config.num_train_timesteps]), torch.as_tensor(fresh.timesteps)
        )
    alpha_bar, prediction = getattr(fresh, "alphas_cumprod", None), config.get("prediction_type", "epsilon")
    if alpha_bar is None or prediction not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"{name} with prediction_type {prediction!r}: expected a DDPM-like scheduler (epsilon, v_prediction or "
            "sample) or a FlowMatch one"
        )
    return VariancePreserving(torch.as_tensor(alpha_bar), prediction)
