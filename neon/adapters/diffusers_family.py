"""Any diffusers pipeline as a family: S by the pipeline's own call, the loss by its scheduler, a pipeline folder out.

Unconditional (DDPMPipeline, DDIMPipeline), class-conditional (DiTPipeline) and text-conditional models
(StableDiffusionPipeline), on pixels or on the latents of an AutoencoderKL.
"""

# B images, C channels, H height, W width

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from neon.quantize import from_uint8

try:
    import diffusers
except ImportError as error:
    raise ImportError("family diffusers needs an extra: pip install 'neon-generative[diffusers]'") from error

from neon.adapters.lora import add_lora, folded, write_adapter
from neon.adapters.objective import Forward, forward_of
from neon.adapters.pipeline_folder import PipelineFolder, class_of_diffusers
from neon.checkpoints.checkpoint import Checkpoint
from neon.family import Draws, Family
from neon.seeds import ImageRng, Rng, derived_seed
from neon.store import files


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the pipeline is called."""

    num_steps: int = 50
    """num_inference_steps."""
    cfg_scale: float | None = None
    """guidance_scale of a class- or text-conditional pipeline."""
    eta: float | None = None
    """Of DDIM: 0 is deterministic, 1 is DDPM. None: the pipeline's default."""
    scheduler: str | None = None
    """Another scheduler class of diffusers, made from the pipeline's own configuration, for example "DDIMScheduler"."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {self.num_steps}")
        if self.scheduler is not None:
            class_of_diffusers(self.scheduler, diffusers.SchedulerMixin, "scheduler")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Options of the loss; noise levels and targets are the scheduler's."""

    time: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the training time; logit_normal as in diffusers' flow-matching scripts (arXiv 2403.03206)."""
    label_drop: float = 0.0
    """Probability that an image is trained without its prompt, for guidance. A DiT drops labels by itself."""
    lora_rank: int = 0
    """0: every weight is trained. Else only matrices of this rank beside `lora_targets`."""
    lora_alpha: float | None = None
    """Their scale is lora_alpha / lora_rank; None: 1."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop must be in 0 .. 1, got {self.label_drop}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be >= 0, got {self.lora_rank}")


@dataclass(eq=False, kw_only=True)
class PipelineBase(Checkpoint):
    """The denoiser of a pipeline folder, and what its images depend on besides: the whole folder, the prompts."""

    folder: PipelineFolder
    prompts: Path | None

    @cached_property
    def sha256(self) -> str:
        """Of the whole folder and of the prompts."""
        if self.prompts is None:
            return self.folder.sha256
        return hashlib.sha256(f"{self.folder.sha256}\n{files.sha256_of(self.prompts)}".encode()).hexdigest()


class Diffusers(Family[nn.Module, Objective, Sampling]):
    """Codes are images (B, C, H, W) in [-1, 1]; a latent pipeline trains on moments (B, 2C, h, w) of its autoencoder.

    A prompt counts as a class: image i of a block has prompt i mod their number, and its label is the prompt's line.
    """

    name = "diffusers"
    sampling = Sampling
    objective = Objective

    def __init__(self) -> None:
        self._folder: PipelineFolder | None = None
        self._prompts: list[str] = []
        self._pipeline: diffusers.DiffusionPipeline | None = None
        self._forward: Forward | None = None
        self._device = torch.device("cpu")
        self._lora_scale: float | None = None

    def read_base(self, path: Path, *, weights: str, prompts: Path | None) -> Checkpoint:
        """path: the pipeline's folder."""
        folder = PipelineFolder.open(path)
        check_served(folder)
        self._folder = folder
        if (self.kind == "prompt") != (prompts is not None):
            need = "needs prompts, a text file with one prompt per line" if prompts is None else "takes no prompts"
            raise ValueError(f"[base]: {path} is a {folder.index['_class_name']}, which {need}")
        if prompts is not None:
            self._prompts = read_prompts(prompts)
        model = folder.read_model()
        arch = json.loads(json.dumps({k: v for k, v in model.config.items() if k != "_name_or_path"}))
        return PipelineBase(dict(model.state_dict()), arch, self.name, "unnamed", path, folder=folder, prompts=prompts)

    @property
    def kind(self) -> Literal["batch_size", "class_labels", "prompt"]:
        """The argument of the pipeline's call that says which images are wanted."""
        assert self._folder is not None
        name = str(self._folder.index["_class_name"])
        known = inspect.signature(getattr(diffusers, name).__call__).parameters
        for kind in ("class_labels", "prompt", "batch_size"):
            if kind in known:
                return kind
        raise ValueError(f"{name} takes neither class_labels nor prompt nor batch_size: it is not served")

    @property
    def is_guided(self) -> bool:
        return self._folder is None or self.kind != "batch_size"  # before the pipeline is known, cfg_scale may stand

    def build(self, arch: Mapping[str, object]) -> nn.Module:
        kind = class_of_diffusers(arch.get("_class_name"), diffusers.ModelMixin, "arch._class_name")
        model: nn.Module = kind.from_config(dict(arch))
        return model

    def open(self, autoencoder: Path | None, device: torch.device) -> None:
        if autoencoder is not None:
            raise ValueError("[base] autoencoder: a pipeline brings its own")
        self._device = device

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        assert self._folder is not None
        model = super().load(checkpoint)
        self._pipeline = self._folder.open_pipeline(model, self._device)
        self._scheduler = self._pipeline.scheduler
        self._forward = forward_of(self._scheduler)
        return model

    @property
    def pipeline(self) -> diffusers.DiffusionPipeline:
        assert self._pipeline is not None, "load comes first"
        return self._pipeline

    def sample(self, model: nn.Module, rng: Rng, labels: Tensor | None, how: Sampling) -> tuple[Tensor, Tensor | None]:
        """By the pipeline's own call with one generator per image. Raises ValueError if it draws anything else."""
        assert isinstance(rng, ImageRng)
        pipeline, count = self.pipeline, self.num_classes(model)
        pipeline.register_modules(**{self._denoiser: model})
        own = type(self._scheduler)
        if how.scheduler is not None:
            own = class_of_diffusers(how.scheduler, diffusers.SchedulerMixin, "sampling.scheduler")
        pipeline.scheduler = own.from_config(self._scheduler.config)
        if self.kind == "batch_size":
            labels = None
            asked: dict[str, object] = {"batch_size": rng.batch}
        else:
            drawn = rng.integers(count)  # also where labels are given, so that they leave the noise alone
            labels = drawn if labels is None else labels
            lines = labels.tolist()
            asked = {self.kind: lines if self.kind == "class_labels" else [self._prompts[i] for i in lines]}
        options = {"guidance_scale": how.cfg_scale, "eta": how.eta}
        state = global_state(self._device)
        found = pipeline(
            **asked,
            **{key: value for key, value in options.items() if value is not None},
            generator=rng.generators,
            num_inference_steps=how.num_steps,
            output_type="pt",
        )
        if not torch.equal(global_state(self._device), state):
            raise ValueError(
                f"{type(pipeline).__name__} with {type(pipeline.scheduler).__name__} draws noise outside of its "
                "generators, so an image would depend on its batch; name a deterministic one: "
                "sampling.scheduler = 'DDIMScheduler'"
            )
        return found.images.float() * 2 - 1, labels

    @property
    def _denoiser(self) -> str:
        assert self._folder is not None
        return self._folder.denoiser

    @property
    def _autoencoder(self) -> diffusers.AutoencoderKL | None:
        vae = getattr(self.pipeline, "vae", None)
        if vae is not None and not isinstance(vae, diffusers.AutoencoderKL):
            raise ValueError(f"the pipeline's autoencoder is a {type(vae).__name__}, only AutoencoderKL is served")
        return vae

    def autoencoder_modules(self) -> list[nn.Module]:
        return [] if self._autoencoder is None else [self._autoencoder]

    def encode(self, images: Tensor) -> Tensor:
        """Pixels stay bytes; for a latent pipeline the posterior's mean and standard deviation, (B, 2C, h, w)."""
        vae = self._autoencoder
        if vae is None:
            return images
        posterior = vae.encode(pixels(images, vae.config.in_channels)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    def draw(self, rng: Rng, codes: Tensor, labels: Tensor | None, how: Objective) -> Draws:
        """In this order: time (B,), noise like x, posterior like x (latents), label_drop (B,) (prompts)."""
        is_latent = self._autoencoder is not None
        channels, *sides = codes.shape[1:]
        shape = (channels // 2 if is_latent else channels, *sides)
        time = rng.uniform(()) if how.time == "uniform" else rng.normal(()).sigmoid()
        draws = {"time": time, "noise": rng.normal(shape)}
        if is_latent:
            draws["posterior"] = rng.normal(shape)
        if self.kind == "prompt" and how.label_drop:
            draws["label_drop"] = rng.uniform(())
        return draws

    def loss(self, model: nn.Module, codes: Tensor, labels: Tensor | None, draws: Draws, how: Objective) -> Tensor:
        """The mean squared error of every image's prediction."""
        assert self._forward is not None
        x = self._clean(codes, draws)
        x_t, t, target = self._forward.noised(x, draws["noise"], draws["time"].clamp(max=1 - 1e-6))
        prediction = model(x_t, t, **self._condition(labels, draws, how)).sample
        prediction = prediction[:, : x.shape[1]]  # a DiT predicts variances in further channels, left as they are
        return (prediction.float() - target).square().mean((1, 2, 3))

    def _clean(self, codes: Tensor, draws: Draws) -> Tensor:
        """x of stored images or moments: what the network's noise is added to."""
        vae = self._autoencoder
        if vae is None:
            return pixels(codes)
        if codes.shape[1] != 2 * vae.config.latent_channels:
            raise ValueError("a latent pipeline is fine-tuned on stored images: set synth.store = 'images'")
        mean, std = codes.chunk(2, dim=1)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (mean + std * draws["posterior"] - shift) * vae.config.scaling_factor

    def _condition(self, labels: Tensor | None, draws: Draws, how: Objective) -> dict[str, Tensor]:
        if self.kind == "batch_size":
            return {}
        if labels is None:
            raise ValueError(f"{type(self.pipeline).__name__} is conditional, but the images have no labels")
        if self.kind == "class_labels":
            return {"class_labels": labels}
        dropped = draws["label_drop"] < how.label_drop if "label_drop" in draws else torch.zeros_like(labels).bool()
        prompts = ["" if drop else self._prompts[i] for i, drop in zip(labels.tolist(), dropped.tolist(), strict=True)]
        with torch.no_grad():
            embedded = self.pipeline.encode_prompt(prompts, self._device, 1, False)[0]
        return {"encoder_hidden_states": embedded}

    def adapted(self, model: nn.Module, how: Objective) -> nn.Module:
        """With LoRA matrices, if they are asked for."""
        if how.lora_rank == 0:
            return model
        alpha = how.lora_rank if how.lora_alpha is None else how.lora_alpha
        self._lora_scale = alpha / how.lora_rank
        seed = derived_seed(how.lora_seed, "lora")
        return add_lora(model, rank=how.lora_rank, alpha=alpha, targets=how.lora_targets, seed=seed)

    def trains(self, name: str, parameter: nn.Parameter) -> bool:
        return self._lora_scale is None or ".lora_" in name

    def plain(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return state if self._lora_scale is None else folded(state, self._lora_scale)

    def export(self, weights: Mapping[str, Tensor], folder: Path, how: Objective) -> Path:
        """`folder`/pipeline: the base's pipeline with these weights, for DiffusionPipeline.from_pretrained. Of a
        low-rank fine-tune also `folder`/adapter: the small file that makes them of the base."""
        assert self._folder is not None
        self._folder.write_with(weights, folder / "pipeline")
        if how.lora_rank:
            kind = getattr(diffusers, str(self._folder.index["_class_name"]))
            part = self._denoiser if hasattr(kind, "load_lora_weights") else None
            write_adapter(folder / "adapter", self._folder.read_model().state_dict(), weights, how.lora_rank, part)
        return folder / "pipeline"

    def img_size(self, model: nn.Module) -> int:
        vae = self._autoencoder
        config: diffusers.ConfigMixin = model.config
        return int(config.sample_size) * (1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1))

    def num_classes(self, model: nn.Module) -> int:
        if self.kind == "class_labels":
            config: diffusers.ConfigMixin = model.config
            return int(config.num_embeds_ada_norm)
        return len(self._prompts)


SERVED = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")


def check_served(folder: PipelineFolder) -> None:
    """Raise ValueError for a network that is told more than noise, time, and one class or one prompt embedding."""
    library, name = folder.parts[folder.denoiser]
    config = folder.denoiser_config
    more = [key for key in ("addition_embed_type", "class_embed_type", "num_class_embeds") if config.get(key)]
    if library != "diffusers" or name not in SERVED or more:
        what = f" with {', '.join(more)}" if more else ""
        raise ValueError(
            f"{folder.path}: `neon run` does not serve a {name}{what} yet (served: {', '.join(SERVED)} without such "
            "inputs). Fine-tune it, or a LoRA of it, on its own images with a script of diffusers; `neon merge` makes "
            "Neon's weights or a small LoRA file of the result (docs/merging.md)"
        )


def pixels(images: Tensor, channels: int | None = None) -> Tensor:
    """Float images in [-1, 1]; grey ones repeated where the autoencoder takes three channels."""
    x = from_uint8(images) if images.dtype == torch.uint8 else images
    return x.expand(-1, 3, -1, -1) if channels == 3 and x.shape[1] == 1 else x


def global_state(device: torch.device) -> Tensor:
    """Where torch's own random streams stand, on the CPU and on `device`."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, without empty ones. Raises ValueError if none is left."""
    if not path.is_file():
        raise FileNotFoundError(f"[base] prompts: no such file {path}")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"[base] prompts: {path} holds no prompt; expected one per line")
    return prompts


FAMILY = Diffusers
