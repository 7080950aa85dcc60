"""A few images of a config's model, to try things on before anything expensive starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from neon import contract, first_batch
from neon.checkpoints import checkpoint
from neon.family import Draws, Family, num_classes_of
from neon.pipeline.base_model import load_network, read_base
from neon.pipeline.experiment import Data, Experiment
from neon.sampling.generate import Batch, Source, generate, to_images
from neon.sampling.options import Sampling
from neon.seeds import SharedRng
from neon.training.recipe import Training


@dataclass
class Probe:
    """The model of a config: the base's weights if the file is there, else a fresh one of [model]."""

    config: Experiment
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def family(self) -> Family:
        family = self.config.family()
        base = self.config.base
        family.open(None if base is None else base.autoencoder_path, self.device)
        return family

    @property
    def is_trained(self) -> bool:
        return self.config.base is not None and self.config.base.is_there

    @cached_property
    def base(self) -> checkpoint.Checkpoint | None:
        return read_base(self.config, self.family) if self.is_trained else None

    @property
    def arch(self) -> Mapping[str, object]:
        """The constructor arguments. Raises ValueError if nothing names them."""
        if self.base is not None:
            return self.family.arch_of(self.base)
        if self.config.model is None:
            named = (
                "the config has no [base]" if self.config.base is None else f"there is no {self.config.base.checkpoint}"
            )
            raise ValueError(
                f"there is no model to try: {named}, and the config has no [model] to build a fresh one from"
            )
        return self.config.model

    @cached_property
    def model(self) -> nn.Module:
        """In evaluation mode."""
        if self.base is None:
            model = contract.network(f"{type(self.family).__name__}.build", self.family.build(self.arch))
        else:
            model = load_network(self.base, self.family)
        return model.to(self.device).eval()

    @property
    def num_classes(self) -> int:
        """Of the network; 0 if it takes no labels."""
        return num_classes_of(self.family, self.model)

    @cached_property
    def source(self) -> Source:
        """What decides the images of [synth], or of [select] where there is no [synth]."""
        sampling = self.config.need("sampling", Sampling)
        synth, select = self.config.synth, self.config.select
        scale = synth.cfg_scale if synth is not None else None
        if scale is None and select is not None and select.cfg_scale:
            scale = select.cfg_scale[0]
        return Source(
            family=self.family,
            sampling=(synth.sampling if synth is not None and synth.sampling is not None else sampling),
            labels="balanced" if synth is None else synth.labels,
            first_seed=0 if synth is None else synth.first_seed,
            num_classes=self.num_classes,
            cfg_scale=scale if self.family.is_guided else None,
        )

    @property
    def recipe(self) -> Training | None:
        """The fine-tune's recipe, or the base's."""
        return self.config.finetune or self.config.train

    @property
    def batch_norms(self) -> str:
        """What no check can see, as these run on one rank and in evaluation mode; empty without such layers."""
        count = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        if not count:
            return ""
        return (
            f"; {count} batch norm{'s' * (count > 1)}: training normalises by the images that a rank has at once "
            "(batch, micro_batch, number of ranks), and keeps the running statistics of the first rank"
        )

    def sample(self, *batches: range) -> list[Batch]:
        """Images of the synthetic set by their indices, every range in one batch."""
        return list(generate(self.source, self.model, batches, self.device))

    def try_scales(self, scales: Mapping[float, str]) -> None:
        """Make one image with every guidance. scales: as `preflight.scales_of`. Raises ValueError naming the key."""
        sampling = replace(self.config.need("sampling", Sampling), speed="exact")  # nothing is compiled for one image
        for scale, where in scales.items():
            source = replace(self.source, sampling=sampling, cfg_scale=scale)
            try:
                list(generate(source, self.model, [range(1)], self.device))
            except ValueError as error:
                raise ValueError(f"{where} = {scale:g}: {error}") from error

    def training_batch(self, num_images: int) -> tuple[Tensor, Tensor | None]:
        """Codes and labels as the fine-tune reads them: images of the model; where nothing can be sampled, of
        [data]."""
        if self.config.sampling is None:
            images = self.config.need("data", Data).open()
            labels = None if images.labels is None else images.labels[:num_images]
            return self._encoded(images.read(range(num_images))), labels
        (batch,) = self.sample(range(num_images))
        labels = None if batch.labels is None else batch.labels.clone()
        if self.config.synth is not None and self.config.synth.store == "codes":
            return batch.codes.clone(), labels
        return self._encoded(self.bytes_of(batch.codes)).clone(), labels

    def _encoded(self, images: Tensor) -> Tensor:
        codes = self.family.encode(images.to(self.device))
        return first_batch.encoded(type(self.family).__name__, codes, len(images))

    def draws(self, codes: Tensor, labels: Tensor | None) -> Draws:
        """The random numbers of a training step on these codes, on the CPU."""
        family, how = self.family, None if self.recipe is None else self.recipe.objective
        rng = SharedRng(len(codes), torch.Generator().manual_seed(0))
        seen = codes.cpu() if family.draws_see_codes(how) else codes.to("meta")
        draws = family.draw(rng, seen, None if labels is None else labels.cpu(), how)
        return dict(first_batch.drawn(type(family).__name__, draws, len(codes)))

    def bytes_of(self, codes: Tensor) -> Tensor:
        """The images of these codes as the run keeps them."""
        return to_images(self.source, codes)
