"""What a generator must say about itself to take part in Neon, and how a name resolves to it.

Nothing in a family knows about ranks, files, w or metrics; nothing outside a family knows which family it serves.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from neon import contract, own_code
from neon.checkpoints.building import bounded
from neon.own_code import shipped
from neon.runtime.speed import Speed
from neon.seeds import Rng

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from neon.checkpoints.checkpoint import Checkpoint

Draws = dict[str, Tensor]
"""Every random number of one training step by name; each tensor has the batch as its first dimension."""


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of a family that has none."""


Model = TypeVar("Model", bound=nn.Module)
"""The class of the family's networks."""
Objective = TypeVar("Objective", bound="DataclassInstance")
"""Frozen dataclass of the loss's options, `NoOptions` if there are none."""
Sampling = TypeVar("Sampling", bound="DataclassInstance")
"""Frozen dataclass of the sampler's options, `NoOptions` if there are none."""


class Trainable(ABC, Generic[Model, Objective]):
    """What the training loop (neon/training/loop.py) asks of a network's mathematics."""

    objective: type[Objective] = cast("type[Objective]", NoOptions)
    """The class of the loss's options. The keys of the recipe's `objective` table fill it."""

    @abstractmethod
    def build(self, arch: Mapping[str, object]) -> Model:
        """The network from its constructor arguments, as checkpoints store them; freshly initialised."""

    @abstractmethod
    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: Objective) -> Draws:
        """Every random number of one training step of the global batch `codes` (B, ...), on the CPU."""

    @abstractmethod
    def loss(self, model: Model, codes: Tensor, labels: Tensor | None, draws: Draws, how: Objective) -> Tensor:
        """The loss of every image, (B,) float."""

    def draws_see_codes(self, how: Objective) -> bool:
        """Whether `draw` uses the values of the codes. Every rank then reads the whole global batch in every step;
        otherwise `draw` gets codes on the meta device, which have a shape and a dtype only."""
        return False

    def group(self, how: Objective) -> int:
        """Number of consecutive images whose loss is computed together; a batch is never split inside one."""
        return 1

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a parameter (where the recipe has any)."""
        return True

    def trains(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether training changes a parameter; the others stay what they are, as do those that `build` gives without
        requires_grad."""
        return True

    def adapted(self, model: Model, how: Objective) -> Model:
        """The model as the fine-tune trains it: a low-rank fine-tune adds its matrices here."""
        return model

    def plain(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A trained model's state dict under the names that `build` gives, what was added folded in."""
        return state


class TrainableAutoencoder(Trainable[Model, Objective]):
    """A family's autoencoder as something to train (`neon train-autoencoder`). Its codes are uint8 images
    (B, C, H, W)."""

    @abstractmethod
    def reconstruct(self, model: Model, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) through encoder, bottleneck and decoder: float images of the same shape in [-1, 1],
        not clipped."""

    def calibrated(self, model: Model, images: Tensor, arch: Mapping[str, object]) -> dict[str, object]:
        """The constructor arguments to store with the trained network. A family that scales its latents measures the
        scale on these uint8 images (B, C, H, W)."""
        return dict(arch)


class Family(Trainable[Model, Objective], Generic[Model, Objective, Sampling]):
    """A kind of generator. One object serves one run: `open` may give it an autoencoder, nothing else changes it.

    `class Mine(Family[Net, Objective, Sampling])` states the types; a plain `Family` works too and is not type-checked.

    Codes are what training eats: pixels in [-1, 1], latents or token maps, with the batch as the first dimension.
    `loss` gets them from `encode` (stored images) or from `sample` (stored codes).
    """

    name: str
    sampling: type[Sampling] = cast("type[Sampling]", NoOptions)
    """The class of the sampler's options; the family is guided if it has a field `cfg_scale`. The keys of [sampling]
    fill it."""
    trainable_autoencoder: TrainableAutoencoder | None = None
    """How to train an autoencoder for this family, if that can be done here."""

    def read_base(self, path: Path, *, weights: str, prompts: Path | None) -> Checkpoint:
        """Open what [base] names. A family whose models are folders or take prompts reads them here."""
        from neon.checkpoints import checkpoint  # here: checkpoints is a floor below, but family.py loads no reader

        if prompts is not None:
            raise ValueError(f"[base] prompts: the family {self.name!r} takes no prompts")
        return checkpoint.read(path, weights=weights)

    def export(self, weights: Mapping[str, Tensor], folder: Path, how: Objective) -> Path | None:
        """Write the improved weights into a run's folder in the family's own form too, if it has one; says where.
        how: what the fine-tune was made with."""
        return None

    def arch_of(self, checkpoint: Checkpoint) -> Mapping[str, object]:
        """Constructor arguments of a checkpoint's network. A family whose published files do not hold them derives
        them from the shapes. Where it raises ValueError, [model] of the config becomes `checkpoint.arch`."""
        if checkpoint.arch is None:
            kind = type(self).__name__
            raise ValueError(
                f"{checkpoint.path} does not say how its network is built, and {self.name} cannot tell from the "
                f"weights. Put the arguments of {kind}.build into the config, for example\n  [model]\n  width = 16\n"
                f"([model] alone if there are none), or let {kind}.arch_of(checkpoint) return them"
            )
        return checkpoint.arch

    def load(self, checkpoint: Checkpoint) -> Model:
        """The network with a checkpoint's weights, strictly: a missing, extra or misshapen entry is an error."""
        with bounded(len(checkpoint.specs)):
            model = contract.network(f"{type(self).__name__}.build", self.build(self.arch_of(checkpoint)))
        checkpoint.load_into(model)
        return model

    compiled: tuple[type[nn.Module], ...] = ()
    """Classes of the blocks that are worth compiling for sampling.speed = "compiled" or "fast". None for convolutional
    U-Nets: on an H200 their compiled blocks were a third slower than graphs of the library's kernels."""

    def graphed(self, model: Model) -> nn.Module | None:
        """The part of `model` whose calls have few different shapes, draw nothing and ask the device nothing; None:
        there is no such part. On a GPU its calls are replayed as CUDA graphs."""
        return None

    graphed_method = "forward"
    """What of that part is replayed. Its arguments are tensors, `speed.Place`s, None, numbers or strings."""
    replayed: tuple[Speed, ...] = ("exact", "compiled", "fast")
    """The speeds in which it is."""

    @property
    def is_guided(self) -> bool:
        """Whether the sampler takes a cfg_scale."""
        return any(field.name == "cfg_scale" for field in fields(self.sampling))

    def with_guidance(self, how: Sampling, cfg_scale: float) -> Sampling:
        """The sampler's options with this guidance."""
        return replace(how, cfg_scale=cfg_scale)

    def open(self, autoencoder: Path | None, device: torch.device) -> None:
        """Make `encode` and `decode` ready. Latent and token families read their autoencoder here."""

    @abstractmethod
    def sample(self, model: Model, rng: Rng, labels: Tensor | None, how: Sampling) -> tuple[Tensor, Tensor | None]:
        """Codes (B, ...) for the images of `rng`, and the labels (B,) int64 that were used (None: unconditional).

        labels None means: draw them from `rng` as the published script of the family does.
        """

    def autoencoder_modules(self) -> list[nn.Module]:
        """The networks that `decode` uses, so that the run's memory format reaches them too."""
        return []

    def decode(self, codes: Tensor) -> Tensor:
        """Float images (B, C, H, W) in [-1, 1], not clipped; `quantize.to_uint8` follows."""
        return codes

    @property
    def maker_of_images(self) -> str:
        """The method that makes the images, for messages: `decode`, or `sample` where the class has no `decode`."""
        return f"{type(self).__name__}.{'sample' if type(self).decode is Family.decode else 'decode'}"

    def encode(self, images: Tensor) -> Tensor:
        """What training keeps of uint8 images (B, C, H, W). Deterministic, so it is done once; `loss` does the rest.

        Pixel families keep the bytes; a latent family keeps its autoencoder's moments.
        """
        return images

    def img_size(self, model: Model) -> int:
        """Side of the decoded images in pixels."""
        raise ValueError(f"{self.name} does not say how large its images are")

    def num_classes(self, model: Model) -> int:
        """Number of class labels the network takes; 0 if it is unconditional."""
        return 0


def num_classes_of(family: Family, model: nn.Module) -> int:
    """Of the network; 0 if it takes no labels. Raises ValueError for what is no such number."""
    return contract.count(f"{type(family).__name__}.num_classes", family.num_classes(model))


ADAPTERS = {"diffusers": "neon.adapters.diffusers_family"}
"""Families that stand for another library's models; each needs the extra of its name."""


def resolve(name: str) -> Family:
    """The family called `name`: NAME stands for `NAME.family:FAMILY`; a family of your own is named "module:attribute".

    Raises ValueError if there is no such module or attribute, if a module of your own cannot be imported, or if the
    class is no whole family.
    """
    module_name, colon, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute if colon else "_"]):
        raise ValueError(f"family {name!r}: expected a shipped name ({', '.join(shipped())}) or 'module:ClassName'")
    target = (module_name, attribute) if attribute else (ADAPTERS.get(name, f"{name}.family"), "FAMILY")
    try:
        module = importlib.import_module(target[0])
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{target[0]}.".startswith(f"{error.name}."):
            raise ValueError(f"no family {name!r}: {_where_to_look(*target, is_own=bool(colon))}") from error
        if not colon:
            raise  # the family exists, something that it imports does not
        raise ValueError(f"family {name!r}: {own_code.told(error)}") from error
    found = getattr(module, target[1], None)
    if not (isinstance(found, type) and issubclass(found, Family)):
        raise ValueError(f"family {name!r}: {_no_family(module, target[1])}")
    return contract.instance_of(found, Family, f"{target[0]}:{target[1]}" if colon else name)


def _where_to_look(module: str, attribute: str, *, is_own: bool) -> str:
    if is_own and module.endswith(".py"):
        return f"a module is named without .py: family = '{module.removesuffix('.py')}:{attribute}'"
    absent = f"there is no module {module!r}. " if is_own else ""
    return (
        f"{absent}Use one of the shipped names ({', '.join([*shipped(), *ADAPTERS])}) or 'module:ClassName' of your "
        "own, in a file beside the config or on PYTHONPATH"
    )


def _no_family(module: ModuleType, attribute: str) -> str:
    """What stands in the place of a Family class, and which ones the module has."""
    there = [
        f"{module.__name__}:{key}"
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Family) and value.__module__ == module.__name__
    ]
    near = f"; did you mean {' or '.join(there)}?" if there else "; it has no subclass of neon.family.Family"
    if not hasattr(module, attribute):
        return f"{module.__name__} has no {attribute}{near}"
    found = getattr(module, attribute)
    return f"{module.__name__}.{attribute} is {found!r}, expected a subclass of neon.family.Family{near}"
