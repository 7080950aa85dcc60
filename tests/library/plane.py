"""The notebook's diffusion model of points in the plane, as a family for `neon run` and as a module for
`neon.improve`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fid.features import Extractor, Features
from neon.family import Draws, Family
from neon.seeds import Rng
from neon.toy.diffusion import LAST_TIME, Diffusion, signal
from neon.toy.experiment import train_base
from neon.toy.stack import Weights
from neon.toy.target import real_points

TOY = Diffusion(num_steps=8)


class Plane(nn.Module):
    """One replica of the notebook's network."""

    def __init__(self) -> None:
        super().__init__()
        fresh = TOY.fresh(1, torch.Generator().manual_seed(0))
        self.layers = nn.ParameterDict({name.replace(".", "_"): value for name, value in fresh.items()})

    @property
    def weights(self) -> Weights:
        return {name.replace("_", "."): value for name, value in self.layers.items()}


def trained(steps: int) -> Plane:
    """A base trained as in the notebook, on 3,000 real points."""
    model = Plane()
    base = train_base(TOY, real_points(1, 3_000, seed=0), steps=steps, lr=1e-3, seed=1)
    model.load_state_dict({f"layers.{name.replace('.', '_')}": value for name, value in base.items()})
    return model


class PlaneFamily(Family):
    name = "plane"

    def build(self, arch: Mapping[str, object]) -> Plane:
        return Plane()

    def sample(self, model: nn.Module, rng: Rng, labels: Tensor | None, how: object) -> tuple[Tensor, None]:
        return TOY.sample(model.weights, rng.normal((2,))[None])[0], None

    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: object) -> Draws:
        return {"time": rng.uniform((1,)), "noise": rng.normal((2,))}

    def loss(self, model: nn.Module, codes: Tensor, labels: Tensor | None, draws: Draws, how: object) -> Tensor:
        """The notebook's, per point: the network's error in the noise."""
        time, noise = LAST_TIME * draws["time"], draws["noise"]
        noisy = signal(time).sqrt() * codes + (1 - signal(time)).sqrt() * noise
        return (TOY.predict_noise(model.weights, noisy[None], time[None])[0] - noise).square().mean(1)


class Coordinates(Extractor):
    name, dim, sha256, comparable = "tests.library.plane:open_coordinates", 2, "0" * 64, "these are points"

    def __call__(self, images: Tensor) -> Features:
        return self.extract(images)

    def extract(self, images: Tensor) -> Features:
        return Features(images.float(), None)


def open_coordinates(*, path: Path | None, device: torch.device | str, allow_unknown_weights: bool) -> Coordinates:
    return Coordinates(device)
