"""`neon train-autoencoder`: a small tokeniser or latent autoencoder from real images, by the same loop as everything
else.

Absolute error without a perceptual or adversarial term: enough for the small images of the tiny configs, and for
nothing larger.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from neon.checkpoints import checkpoint
from neon.config_table import to_plain
from neon.family import TrainableAutoencoder
from neon.images.image_set import ImageSet
from neon.pipeline.experiment import Data, Experiment
from neon.quantize import to_uint8
from neon.runtime.distributed import World
from neon.runtime.progress import say
from neon.seeds import at_random
from neon.store import records
from neon.training.loop import train
from neon.training.recipe import Autoencoder
from neon.training.step_data import check_groups
from neon.training.trainer import Trainer

BATCH = 250
"""Images per call outside training."""
CALIBRATION_IMAGES = 1000
FINGERPRINT_IMAGES = 10_000
"""Of the training images; more are told by their names alone."""


def train_autoencoder(config: Experiment, folder: Path, world: World) -> dict[str, object]:
    """Train [autoencoder] on [data]; writes folder/autoencoder.safetensors and reports the PSNR of the held-out images.

    folder/autoencoder/ holds the log and the state: a killed training goes on where its last saved state stopped. The
    file's metadata names the constructor arguments. Raises ValueError if there are not more images than are held out.
    """
    section, data = config.need("autoencoder", Autoencoder), config.need("data", Data)
    trainable = config.family().trainable_autoencoder
    assert trainable is not None  # neon.pipeline.experiment refuses an [autoencoder] of a family without one
    check_groups("autoencoder.train", trainable, section.train)
    training, held_out = split(data.open(use_labels=False), section.held_out)
    torch.manual_seed(section.train.seed)  # initial weights
    model = trainable.build(section.arch)
    num_parameters = sum(p.numel() for p in model.parameters())
    say(
        world,
        f"train-autoencoder: {num_parameters:,} parameters, {len(training):,} images, {section.train.images:,} "
        "images seen",
    )
    weights = "ema" if section.train.has_ema else "raw"

    def write(trainer: Trainer, path: Path) -> None:
        checkpoint.write(
            path,
            trainer.weights(),
            metadata={"family": config.family_name, "arch": dict(section.arch), "weights": weights},
        )

    source = {"path": data.path, "pad": data.pad, "num_images": len(training)}
    source["data_sha256"] = training.fingerprint(FINGERPRINT_IMAGES)
    identity = {"autoencoder": to_plain(section), "data": source}
    shots = train(trainable, model, training, section.train, folder / "autoencoder", identity, write, world)
    checkpoint.read(shots[-1], weights="any").load_into(model)
    model.to(world.device).eval()
    result = {
        "psnr_db": held_out_psnr(trainable, model, held_out, world.device),
        "held_out": len(held_out),
        "parameters": num_parameters,
    }
    final = folder / "autoencoder.safetensors"
    with torch.inference_mode():
        some = at_random(len(training), CALIBRATION_IMAGES, seed=0).tolist()
        sample = training.read(some).to(world.device)
        arch = trainable.calibrated(model, sample, section.arch)
    if world.is_main:
        metadata = {
            "family": config.family_name,
            "arch": arch,
            "weights": weights,
            "images_seen": section.train.images,
            **result,
        }
        checkpoint.write(final, model.state_dict(), metadata=metadata)
    world.barrier()
    log = records.read_lines(folder / "autoencoder" / "log.jsonl")
    return {
        "autoencoder": str(final),
        "arch": arch,
        "images_seen": log[-1]["images"],
        "loss": log[-1]["loss"],
        **result,
    }


def split(images: ImageSet, held_out: int) -> tuple[ImageSet, ImageSet]:
    """(training, held out): the last `held_out` images are held out."""
    if len(images) <= held_out:
        raise ValueError(
            f"{images.path}: {len(images)} images, but {held_out} are held out: nothing is left to train on"
        )
    border = len(images) - held_out
    return images.subset(range(border)), images.subset(range(border, len(images)))


@torch.inference_mode()
def held_out_psnr(trainable: TrainableAutoencoder, model: nn.Module, images: ImageSet, device: torch.device) -> float:
    """PSNR in dB of the reconstructions, rounded to uint8, from the mean squared error of all pixels of all images."""
    squares, count = torch.zeros((), dtype=torch.float64), 0
    for batch in images.batches(BATCH):
        squares += squared_error(
            to_uint8(trainable.reconstruct(model, batch.to(device)), "round"), batch.to(device)
        ).cpu()
        count += batch.numel()
    return psnr_db(squares.item() / count)


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Sum of squared differences of uint8 images, float64."""
    return (a.double() - b.double()).square().sum()


def psnr_db(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio of 8-bit images, in dB; infinite for identical ones."""
    return math.inf if mean_squared_error == 0 else 10 * math.log10(255**2 / mean_squared_error)
