"""The checks of `neon check`: what a config and its family promise, each tried on a few images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from neon import first_batch
from neon.checkpoints import checkpoint
from neon.evaluation.evaluate import Yardstick
from neon.evaluation.options import Report
from neon.evaluation.yardsticks import open_yardsticks
from neon.images.image_set import ImageSet
from neon.pipeline.experiment import Data, Experiment
from neon.pipeline.needs import Part, missing
from neon.pipeline.preflight import check_guidance, described, doubts, few_images, scales_of, stages_of
from neon.pipeline.probe import Probe
from neon.seeds import global_seed
from neon.training.recipe import Training
from neon.training.step_data import group_of

NUM_IMAGES = 4
"""Enough to tell images from each other, few enough for any model; a multiple of every shipped family's group."""
TOLERANCE = 1e-2
"""Largest difference, in units of [-1, 1], that rounding may make between batches of different size."""
MOST_MOVE = 16
"""From a black to a white image a network's input moves by 2 where codes are scaled to [-1, 1], by 255 where they are
bytes."""


class NotKept(Exception):  # noqa: N818 - it says what is wrong with a family; the program is in order
    """A promise that does not hold; the message says what to do."""


class OutOfRange(NotKept):
    """Images whose range looks wrong; dark or bright ones may be meant."""


class Doubtful(Exception):  # noqa: N818 - as above
    """Nothing is broken, but it is hardly what was meant."""


class Untried(Exception):  # noqa: N818 - as above
    """What a check needs is not there, as the check that this names has said."""


class Trial:
    """The checks on one config; what one of them makes is made once."""

    def __init__(self, config: Experiment, config_path: Path, probe: Probe):
        self.config, self.config_path, self.probe = config, config_path, probe

    @property
    def name(self) -> str:
        """Of the family's class, for messages."""
        return type(self.probe.family).__name__

    def checks(self) -> dict[str, Callable[[], str]]:
        """What costs nothing, then the rest in the order in which a run would meet it."""
        chosen: dict[str, Callable[[], str]] = {"files": self.files, "sections": self.sections}
        if self.config.data is not None:
            chosen["data"] = self.data
        if self.config.report is not None:
            chosen["references"] = self.references
        chosen |= {"network": self.network, "guidance": self.guidance}
        if self.config.sampling is not None:
            chosen |= {
                "images": self.images,
                "same seed, same image": self.same_seed,
                "batch independence": self.batches,
                "save and load": self.save_and_load,
            }
            if len(self.scales) > 1:
                chosen["every guidance"] = self.every_guidance
        if self.probe.recipe is not None and (self.config.sampling or self.config.data):
            chosen |= {"loss per image": self.loss, "gradients": self.gradients}
        if self.config.data is not None:
            chosen["model and data"] = self.model_and_data
        if self.config.report is not None and self.config.sampling is not None:
            chosen["features"] = self.features
        return chosen

    def files(self) -> str:
        absent = missing(self.config, ["base", "autoencoder", "report", "data"], self.config_path)
        to_train = [one for one in absent if one.key == "base.checkpoint" and one.how.startswith("make it: neon train")]
        if lacking := [one for one in absent if one not in to_train]:
            raise NotKept(f"{len(lacking)} missing:\n" + "\n".join(f"  {one}" for one in lacking))
        return f"all there but the base, which this config trains\n  {to_train[0]}" if to_train else "all there"

    def network(self) -> str:
        model = self.probe.model
        base = self.config.base
        origin = base.checkpoint if base is not None and self.probe.is_trained else "fresh, of [model]"
        return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters ({origin})"

    def sections(self) -> str:
        found = described(self.config, self.config.family())
        if doubtful := doubts(self.config):
            raise Doubtful("; ".join(doubtful))
        return found

    def guidance(self) -> str:
        stages = stages_of(self.config)
        check_guidance(self.config, self.probe.family, stages)
        return "named where images are made" if self.probe.family.is_guided else "the model has none"

    @property
    def scales(self) -> dict[float, str]:
        return scales_of(self.config, stages_of(self.config))

    def every_guidance(self) -> str:
        self.pictures  # noqa: B018 - with the first of them
        self.probe.try_scales(self.scales)
        return f"an image with each: {', '.join(f'{scale:g}' for scale in self.scales)}"

    @cached_property
    def codes(self) -> Tensor:
        return self.probe.sample(range(NUM_IMAGES))[0].codes

    def decoded(self, codes: Tensor) -> Tensor:
        """Float images, not clipped."""
        with torch.inference_mode():
            images = self.probe.family.decode(codes)
        if self.probe.source.sampling.uint8 == "none":
            return images
        return first_batch.decoded(self.probe.family.maker_of_images, images, len(codes)).float()

    @cached_property
    def pictures(self) -> Tensor:
        """The codes' images, floats, finite; made before whatever needs them."""
        images = self.decoded(self.codes)
        if not torch.isfinite(images.float()).all():
            raise NotKept("the images hold NaN or infinities")
        return images

    def images(self) -> str:
        images, maker = self.pictures, self.probe.family.maker_of_images
        low, high = float(images.min()), float(images.max())
        if images.is_floating_point() and first_batch.lies_in_unit_interval(images):
            raise OutOfRange(
                f"all values lie in [{low:.3f}, {high:.3f}]: {maker} must return [-1, 1], that is 2 x - 1 of [0, 1]"
            )
        if self.probe.is_trained and (low < -3 or high > 3):
            raise OutOfRange(f"the values span [{low:.1f}, {high:.1f}]: {maker} must return images in [-1, 1]")
        codes = "" if self.codes is images else f", codes {tuple(self.codes.shape[1:])}"
        return f"{tuple(images.shape[1:])} each, values {low:.2f} to {high:.2f}{codes}"

    def same_seed(self) -> str:
        """Twice, with the global generator in another state: noise may come from `rng` alone."""
        self.pictures  # noqa: B018 - NaN is never equal to NaN
        with global_seed(987654321, self.probe.device):
            again = self.probe.sample(range(NUM_IMAGES))[0].codes
        if not torch.equal(again, self.codes):
            raise NotKept(
                f"{self.name}.sample gave other images for the same seeds (difference up to "
                f"{_gap(again, self.codes):.3g}): draw all noise from `rng`, none from torch.randn and its like; no "
                "dropout, no batch statistics"
            )
        if torch.equal(self.codes[0], self.codes[1]):
            raise NotKept(f"{self.name}.sample gave the same image for different seeds: draw the noise from `rng`")
        return "bit for bit"

    def batches(self) -> str:
        self.same_seed()  # without which nothing can be compared
        halves = self.probe.sample(range(NUM_IMAGES // 2), range(NUM_IMAGES // 2, NUM_IMAGES))
        apart, together = torch.cat([self.decoded(half.codes) for half in halves]), self.pictures
        gap = _gap(apart, together)
        if gap > TOLERANCE:
            raise NotKept(
                f"an image depends on the others of its batch (difference up to {gap:.3g}): nothing in "
                f"{self.name}.sample or its network may look across the batch"
            )
        return "bit for bit" if gap == 0 else f"difference up to {gap:.1g}, rounding"

    def save_and_load(self) -> str:
        """A merged file is written as this one is, and must give the same network."""
        self.same_seed()
        model = self.probe.model
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            meta = {"family": self.config.family_name, "arch": dict(self.probe.arch), "weights": "raw"}
            checkpoint.write(path, model.state_dict(), metadata=meta)
            again = self.probe.family.load(checkpoint.read(path, weights="any")).to(self.probe.device).eval()
            kept, self.probe.model = model, again
            try:
                codes = self.probe.sample(range(NUM_IMAGES))[0].codes
            finally:
                self.probe.model = kept
        if not torch.equal(codes, self.codes):
            raise NotKept(
                "the network that was saved and loaded gives other images: something that it computes with is neither "
                "a parameter, a buffer nor a constructor argument"
            )
        return "the same images"

    @cached_property
    def training_batch(self) -> tuple[Tensor, Tensor | None]:
        if self.config.sampling is not None:
            self.pictures  # noqa: B018 - what is no image cannot be kept as one
        return self.probe.training_batch(NUM_IMAGES)

    @property
    def _recipe(self) -> Training:
        assert self.probe.recipe is not None  # the checks that ask for it are chosen only where there is one
        return self.probe.recipe

    def losses(self, chosen: slice = slice(None), seed: int = 0, grey: int | None = None) -> Tensor:
        """Losses of some of the training batch's images, in evaluation mode, with the global generator at `seed`; of
        images of one grey in their place, where that is named."""
        codes, labels = self.training_batch
        if grey is not None:
            codes = torch.full_like(codes, grey)
        draws = {name: value[chosen].to(self.probe.device) for name, value in self.probe.draws(codes, labels).items()}
        part, part_labels = codes[chosen], None if labels is None else labels[chosen].to(self.probe.device)
        with global_seed(seed, self.probe.device):
            found = self.probe.family.loss(self.probe.model, part, part_labels, draws, self._recipe.objective)
        return first_batch.losses(self.name, found, len(part))

    def loss(self) -> str:
        with torch.no_grad():
            together, again = self.losses(), self.losses(seed=987654321)
            group = group_of(self.probe.family, self._recipe)
            alone = self.losses(slice(0, group)) if group < NUM_IMAGES else together[:group]
        if not torch.isfinite(together).all():
            raise NotKept("the loss is not finite")
        if not torch.equal(together, again):
            raise NotKept(
                f"{self.name}.loss gave another value for the same `draws`: every random number of a step comes from "
                f"{self.name}.draw"
            )
        if not torch.allclose(alone, together[:group], rtol=1e-2, atol=1e-4):
            raise NotKept(
                f"the loss of an image depends on the others of its batch ({_spaced(alone)} alone, "
                f"{_spaced(together[:group])} among {NUM_IMAGES}): average over all dimensions but the first"
            )
        if (move := self._move_of_input()) > MOST_MOVE:
            raise Doubtful(
                f"{_spaced(together)}; from a black to a white image the network's input moves by {move:.0f} instead "
                f"of 2: the codes look like bytes. Stored images come to {self.name}.loss as uint8, 0 to 255: "
                "codes / 127.5 - 1"
            )
        return _spaced(together) + self.probe.batch_norms

    def _move_of_input(self) -> float:
        """Largest difference of what the network is given for black and for white images, with the same draws. 0 where
        codes are no bytes, or the network is not called as a whole."""
        if self.training_batch[0].dtype != torch.uint8 or self.probe.family.draws_see_codes(self._recipe.objective):
            return 0.0
        seen: list[Tensor] = []

        def note(module: nn.Module, args: tuple[object, ...], options: dict[str, object]) -> None:
            values = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
            seen.extend(value.detach().double() for value in values if value.is_floating_point())

        hook = self.probe.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with torch.no_grad():
                self.losses(grey=0)
                black = list(seen)
                seen.clear()
                self.losses(grey=255)
        finally:
            hook.remove()
        pairs = [(a, b) for a, b in zip(black, seen, strict=False) if a.shape == b.shape]
        return max((_gap(a, b) for a, b in pairs), default=0.0)

    def gradients(self) -> str:
        model = self.probe.model
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.probe.family.trains(name, parameter))
            with torch.enable_grad():
                self.losses().sum().backward()
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            without = [name for name, p in trained if p.grad is None]
            broken = [name for name, p in trained if p.grad is not None and not torch.isfinite(p.grad).all()]
        finally:
            model.zero_grad(set_to_none=True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        if broken:
            raise NotKept(f"the gradient of {broken[0]} is not finite ({len(broken)} such parameters)")
        if len(without) == len(trained):
            raise NotKept(f"no parameter has a gradient: {first_batch.detached(self.name)}")
        unused = f"; {len(without)} have none, first {without[0]}" if without else ""
        return f"finite in {len(trained) - len(without)} of {len(trained)} parameters{unused}"

    def _need(self, part: Part) -> None:
        if missing(self.config, [part], self.config_path):
            raise Untried("files")

    @cached_property
    def real(self) -> ImageSet:
        """The images of [data]."""
        self._need("data")
        return self.config.need("data", Data).open()

    def data(self) -> str:
        return f"{len(self.real):,} images {tuple(self.real.shape)}, {self.real.num_classes} classes"

    def model_and_data(self) -> str:
        images, data = self.real, self.config.need("data", Data)
        if self.config.sampling is not None:
            made = tuple(self.pictures.shape[1:])
            if made != tuple(images.shape):
                raise NotKept(f"{data.path} holds images {tuple(images.shape)}, the model makes {made}")
        classes = self.probe.num_classes
        data.check_classes(images, classes)
        return f"the model has {classes} classes"

    @cached_property
    def yardsticks(self) -> Sequence[Yardstick]:
        self._need("report")
        return open_yardsticks(self._report, self.probe.device)

    @property
    def _report(self) -> Report:
        return self.config.need("report", Report)

    def references(self) -> str:
        pairs = list(zip(self._report.extractors, self.yardsticks, strict=True))
        few = [one for name, yardstick in pairs for one in few_images(self.config, name, yardstick.extractor.dim)]
        if few:
            raise Doubtful("; ".join(few))
        return "; ".join(f"{y.extractor.name}: {y.extractor.dim} features, as its reference" for _, y in pairs)

    def features(self) -> str:
        yardsticks, _ = self.yardsticks, self.pictures  # what is no image has no features
        for yardstick in yardsticks:
            yardstick.extractor(self.probe.bytes_of(self.codes))
        return f"{NUM_IMAGES} images through {', '.join(y.extractor.name for y in yardsticks)}"


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _spaced(values: Tensor) -> str:
    return " ".join(f"{value:.3g}" for value in values.tolist())
