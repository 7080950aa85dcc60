"""A family and a yardstick made of functions: what `neon.improve` puts in place of a config's names."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fid.evaluator import Collector
from fid.features import Extractor, Features
from fid.metrics import metric_name
from fid.store import FeatureStore
from neon.evaluation.evaluate import Yardstick
from neon.family import Draws, Family
from neon.first_batch import lies_in_unit_interval
from neon.library.fingerprint import fingerprint
from neon.quantize import DivergedError, Rule, to_uint8
from neon.runtime.precision import Precision, arithmetic
from neon.seeds import ImageRng, Rng, SharedRng
from neon.store.shards import Corpus

Sample = Callable[[nn.Module, Sequence[int]], Tensor | tuple[Tensor, Tensor]]
"""(model, seeds) -> images (B, ...), or (images, labels (B,) int64). Image b depends on the weights and on seeds[b]
alone: draw its noise from a generator with that seed, for example `neon.ImageRng(seeds, device).normal(shape)`."""
Loss = Callable[[nn.Module, Tensor, Tensor | None, torch.Generator], Tensor]
"""(model, images, labels, generator) -> the loss of every image, (B,). images: as `sample` made them. Every random
number comes from the generator, which lives on the CPU."""
Score = Callable[[Tensor], float]
"""images (N, ...), as `sample` made them, on the CPU -> a number; smaller is better."""
ROUNDING_OF_SIZES = 0.1
"""Share of what two images differ by that an image may move when it is drawn in a batch of another size: other kernels
round otherwise, which many steps in bfloat16 blow up, but far less than another seed does."""
ROUNDING = 0.01
"""The same in a batch of the same size with another neighbour: by the same kernels an image is the same to the bit, but
where the neighbours decide how the work is divided."""
FAR_OUTSIDE = 10.0
"""What no sampler of images in [-1, 1] reaches, but bytes as floats do."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """[sampling] of a run on functions."""

    function: str
    """Fingerprint of `sample`: a folder that was begun with another function is refused."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """[finetune.objective] of a run on functions."""

    function: str
    """Fingerprint of `loss`."""
    batch: int
    """The loss sees the whole batch at once: it has one generator."""


class Functions(Family[nn.Module, Objective, Sampler]):
    """A network in memory with its `sample` and `loss`. The network itself is only ever copied."""

    name = "functions"
    sampling = Sampler
    objective = Objective

    def __init__(self, model: nn.Module, sample: Sample, loss: Loss, rule: Rule | None):
        """rule: how float images in [-1, 1] become bytes; None: whatever `sample` makes is left as it is."""
        self._model, self._sample, self._loss, self._rule = model, sample, loss, rule
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not self._trained:
            raise ValueError("no parameter of the model requires a gradient, so there is nothing to fine-tune")

    def build(self, arch: Mapping[str, object]) -> nn.Module:
        try:
            return copy.deepcopy(self._model)
        except Exception as error:
            if (part := uncopied(self._model)) is None:
                raise
            raise ValueError(
                f"the model cannot be copied, and what is fine-tuned is a copy of it: {part}; take that out of the "
                "model, `sample` and `loss` can hold it themselves"
            ) from error

    def trains(self, name: str, parameter: nn.Parameter) -> bool:
        return name in self._trained

    def sample(self, model: nn.Module, rng: Rng, labels: Tensor | None, how: Sampler) -> tuple[Tensor, Tensor | None]:
        assert isinstance(rng, ImageRng)
        with torch.inference_mode(False), torch.no_grad():  # a sampler may follow the gradient of an energy
            return images_and_labels(self._sample(model, rng.seeds), len(rng.seeds))

    def decode(self, codes: Tensor) -> Tensor:
        """uint8 images under a rule (bytes stay what they are), else the codes themselves."""
        return codes if self._rule is None or codes.dtype == torch.uint8 else to_uint8(codes, self._rule)

    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: Objective) -> Draws:
        """The seed of the step's generator, for every image the same: the loss function draws by itself."""
        assert isinstance(rng, SharedRng)
        assert rng.generator is not None
        return {"seed": torch.full((len(codes),), rng.generator.initial_seed())}

    def loss(self, model: nn.Module, codes: Tensor, labels: Tensor | None, draws: Draws, how: Objective) -> Tensor:
        return self._losses(model, codes, labels, int(draws["seed"][0]))

    def _losses(self, model: nn.Module, codes: Tensor, labels: Tensor | None, seed: int) -> Tensor:
        losses: object = self._loss(model, codes, labels, torch.Generator().manual_seed(seed))
        if not isinstance(losses, Tensor) or losses.shape != (len(codes),):
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss: expected one number per image, shape ({len(codes)},), got {found}; "
                "take the mean over the other dimensions only"
            )
        return losses

    def try_loss(self, images: Tensor, labels: Tensor | None, batch: int, precision: Precision) -> None:
        """The loss of a whole batch of these images, on a copy of the network, as the fine-tune will ask for it. Raises
        ValueError."""
        model, chosen = self.build({}).train(), torch.arange(batch) % len(images)
        device = next(model.parameters()).device
        of_labels = None if labels is None else labels[chosen].to(device)
        with arithmetic(device, precision), suppress(torch.linalg.LinAlgError):  # a few images, repeated: singular
            self._losses(model, images[chosen].to(device), of_labels, 0)

    def group(self, how: Objective) -> int:
        return how.batch


def uncopied(model: nn.Module) -> str | None:
    """The first thing in a model that copy.deepcopy refuses, with its reason; None if each alone can be copied."""
    others = {id(module): module for module in model.modules()}  # taken as copied: what they hold is their own
    for name, module in model.named_modules():
        for key, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if key in ("_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value, dict(others))
            except Exception as error:
                return f"{name}.{key} ({type(value).__name__}: {error})".lstrip(".")
    return None


def images_and_labels(found: object, count: int) -> tuple[Tensor, Tensor | None]:
    """What a `sample` function returned, checked."""
    images, labels = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(images, Tensor) or images.ndim < 2 or len(images) != count:
        what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"sample: expected a tensor of {count} images, shape ({count}, ...), got {what}")
    if images.is_complex():
        raise ValueError(
            "sample: complex images cannot be scored; return both parts as real numbers: torch.view_as_real(x)"
        )
    if labels is not None and (
        not isinstance(labels, Tensor) or labels.shape != (count,) or labels.is_floating_point()
    ):
        what = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"sample: expected integer labels of shape ({count},) beside the images, got {what}")
    return images, None if labels is None else labels.long()


def check_takes(name: str, function: object, arguments: str) -> None:
    """Raise ValueError unless `function` can be called with these arguments, "model, seeds", one after the other."""
    if not callable(function):
        raise ValueError(f"{name} must be a function {name}({arguments}), not {type(function).__name__}")
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # a decorator may give further arguments
    except (TypeError, ValueError):  # some that are written in C do not say
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        raise ValueError(f"expected {name}({arguments}), it is {name}{signature}: {error}") from error


def check_per_image(sample: Sample, model: nn.Module, first_seed: int) -> tuple[Tensor, Tensor | None]:
    """The images and labels of two seeds, if the second image is the same when it is drawn alone and when it is drawn
    beside a third one; ValueError if it is not."""
    one, two, three = range(first_seed, first_seed + 3)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: what the network keeps of a first call must serve training too
            together, labels = images_and_labels(sample(model, [one, two]), 2)
            alone, _ = images_and_labels(sample(model, [two]), 1)
            beside, _ = images_and_labels(sample(model, [three, two]), 2)
    finally:
        for module, mode in modes.items():
            module.training = mode
    for images, where in ((together, ""), (beside, ""), (alone, f" where one is drawn alone, that of seed {two}")):
        if not images.double().isfinite().all():
            raise ValueError(f"sample: the model's images hold numbers that are not finite{where}")
    own = together[1].double()
    alone_moved, moved, apart = (
        float((other.double() - own).abs().mean()) for other in (alone[0], beside[1], together[0])
    )
    if alone_moved > ROUNDING_OF_SIZES * apart:
        raise ValueError(
            f"sample: the image of seed {two} is another one when it is drawn alone than when it is drawn with "
            f"seed {one}. Give every image a generator of its own, seeded with its seed: "
            "neon.ImageRng(seeds, device).normal(shape)"
        )
    if moved > ROUNDING * apart:
        raise ValueError(
            f"sample: the image of seed {two} is another one beside seed {three} than beside seed {one}, by "
            f"{100 * moved / apart:.2g} % of what two images differ by: nothing in `sample` or the network may look "
            "across the batch (batch statistics, a step size or a range of all images)"
        )
    return together, labels


def check_range(images: Tensor) -> None:
    """Float images for an extractor lie in [-1, 1]; ValueError for what looks like [0, 1] or like bytes."""
    if not images.is_floating_point():
        return
    low, high = images.min().item(), images.max().item()
    wanted = f"sample: float images must lie in [-1, 1] to be compared with a reference; these reach from {low:.3g} to"
    if lies_in_unit_interval(images):
        raise ValueError(f"{wanted} {high:.3g}: return 2 * x - 1")
    if max(-low, high) > FAR_OUTSIDE:
        raise ValueError(f"{wanted} {high:.3g}: return x / 127.5 - 1 if these are bytes, or uint8")


class Whole(Extractor):
    """The images themselves in place of features, for a score that is a function."""

    comparable = "the score is a function of your own"

    def __init__(self, name: str, sha256: str, shape: Sequence[int]):
        super().__init__("cpu")
        self.name, self.sha256, self.dim = name, sha256, math.prod(shape)

    def extract(self, images: Tensor) -> Features:
        return Features(images.flatten(1).float(), None)


class Kept(Collector):
    """Keeps every image and no sums: a covariance of all pixels would not fit anywhere."""

    def __init__(self, extractor: Whole, num_images: int, folder: Path | None):
        super().__init__(extractor, num_images, ())
        self.stores["features"] = FeatureStore(num_images, extractor.dim, file=folder and folder / "images.f32")

    def update(self, images: Tensor, indices: Sequence[int]) -> None:
        self.stores["features"].put(indices, self.extractor.extract(images).pool)


@dataclass(frozen=True, kw_only=True)
class FunctionScore(Yardstick):
    """A `Score` as a yardstick: it sees the images of a whole block at once."""

    function: Score
    example: Tensor
    """(B, ...) images of the block's shape and dtype."""

    def collector(self, num_images: int, folder: Path | None) -> Collector:
        assert isinstance(self.extractor, Whole)
        return Kept(self.extractor, num_images, folder)

    def headline(self, num_images: int) -> str:
        return metric_name("score", num_images, self.extractor.name)

    def values(self, collector: Collector) -> dict[str, float]:
        images = collector.features.view(-1, *self.example.shape[1:]).to(self.example.dtype)
        return {self.headline(len(images)): self._value(images)}

    def try_out(self, images: Corpus, num_images: int) -> None:
        """The score of images of S, if there are as many as it will get later."""
        if len(images) >= num_images:
            self._value(images.read(range(num_images)))

    def _value(self, images: Tensor) -> float:
        if not images.isfinite().all():
            raise DivergedError("the images hold NaN or infinities: the sampler diverged")
        found = self.function(images)
        try:
            value = float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            what = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"score: {self.extractor.name} must return one number for all images, it returned {what}"
            ) from error
        if not math.isfinite(value):
            raise ValueError(f"score: {self.extractor.name} gave {value} for {len(images)} images")
        return value


def function_score(function: Score, example: Tensor) -> FunctionScore:
    name = getattr(function, "__name__", type(function).__name__)
    name = "score" if name == "<lambda>" else name
    return FunctionScore(
        extractor=Whole(name, fingerprint(function), example.shape[1:]), function=function, example=example.cpu()
    )
