"""`neon train`: a base model from real images, by the same loop as the fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from neon import contract
from neon.checkpoints import checkpoint
from neon.config_table import to_plain
from neon.family import num_classes_of
from neon.images.image_set import ImageSet
from neon.own_code import source_sha256
from neon.pipeline.experiment import Data, Experiment
from neon.runtime.distributed import World
from neon.runtime.progress import say
from neon.store import files, records
from neon.training.encoding import encoded
from neon.training.loop import train
from neon.training.recipe import Training
from neon.training.step_data import check_groups
from neon.training.trainer import Trainer

IN_MEMORY_BYTES = 8 << 30
FINGERPRINT_IMAGES = 10_000
"""Of a set that does not fit into memory."""


def train_base(config: Experiment, folder: Path, world: World) -> dict[str, object]:
    """Train [model] on [data] by [train]; writes folder/model.safetensors (the moving average, if the recipe has
    one)."""
    recipe, data = config.need("train", Training), config.need("data", Data)
    if config.model is None:
        raise ValueError("the config has no [model] section: the constructor arguments of the network to train")
    family = config.family()
    check_groups("train", family, recipe)
    arch: Mapping[str, object] = {**config.model, **recipe.arch}
    torch.manual_seed(recipe.seed)  # initial weights
    model = contract.network(f"{type(family).__name__}.build", family.build(arch))
    autoencoder = None if config.base is None else config.base.autoencoder_path
    family.open(autoencoder, world.device)
    images = data.open()
    data.check_classes(images, num_classes_of(family, model))
    images, most = _in_memory(images)
    inputs: dict[str, object] = {
        "data_sha256": images.fingerprint(most),
        "autoencoder_sha256": None if autoencoder is None else files.sha256_of(autoencoder),
    }
    source = source_sha256(type(family))
    identity = {
        "model": to_plain(config.model),
        "train": to_plain(recipe),
        "data": to_plain(data),
        "num_images": len(images),
        **inputs,
        **({} if source is None else {"family_source": source}),
    }
    made_of = {"data": data.path, **inputs, **({} if source is None else {"family_source": source})}
    corpus = encoded(family, images, folder / "encoded", made_of, world, 256)
    say(
        world,
        f"train: {sum(p.numel() for p in model.parameters()):,} parameters, {len(images):,} images, {recipe.images:,} "
        "images seen",
    )

    def write(trainer: Trainer, path: Path) -> None:
        metadata = {
            "family": config.family_name,
            "arch": dict(arch),
            "weights": "ema" if recipe.has_ema else "raw",
            "images_seen": trainer.images_seen,
        }
        checkpoint.write(path, trainer.weights(), metadata=metadata)

    shots = train(family, model, corpus, recipe, folder, identity, write, world)
    final = folder / "model.safetensors"
    if world.is_main:
        last = checkpoint.read(shots[-1], weights="any")
        checkpoint.write(final, last.tensors, metadata=last.meta)
    world.barrier()
    log = records.read_lines(folder / "log.jsonl")
    return {"model": str(final), "images_seen": log[-1]["images"], "loss": log[-1]["loss"], "steps": log[-1]["step"]}


def _in_memory(images: ImageSet) -> tuple[ImageSet, int]:
    """The set with its pixels in memory, if they fit: decoding files at every step costs more than the step. And how
    many images its fingerprint may read."""
    if len(images) * int(torch.tensor(images.shape).prod()) > IN_MEMORY_BYTES:
        return images, FINGERPRINT_IMAGES
    return images.in_memory(), len(images)
