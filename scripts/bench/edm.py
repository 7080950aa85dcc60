"""Time sampling and fine-tuning of an EDM network: images per second and the share of the machine's own matmul rate.

\b
    python scripts/bench/edm.py --out results/bench/edm_demo_cpu.json
    python scripts/bench/edm.py --model cifar10 --batch 8 --out results/bench/edm_cifar10_cpu.json
    python scripts/bench/edm.py --model cifar10 --device cuda --batch 256 --mode fp32 --mode channels_last \\
        --mode bf16 --mode fp16

Modes: fp32 (exact), channels_last (another memory order), bf16, fp16 (autocast, and no change of the stored weights).
For the demo model, which is trained, `metric` is fd[fashion-cnn] of --images images of the same noise in every mode.
One to five minutes on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import click
import torch
from measuring import ROOT, about, flops_of, matmul_flops_per_second, peak_mib, publish, reset_peak, seconds_of
from torch import Tensor

from edm.family import EDM
from edm.options import Objective
from edm.options import Sampling as Heun
from edm.precond import Denoiser
from edm.presets import MODELS
from fid.features import open_extractor
from fid.reference import read_reference
from neon.checkpoints import checkpoint
from neon.evaluation.evaluate import Yardstick, evaluate
from neon.runtime.distributed import World
from neon.sampling.generate import Source, generate
from neon.sampling.options import Sampling
from neon.training.loop import train_step
from neon.training.recipe import Training
from neon.training.trainer import Trainer

Mode = Literal["fp32", "channels_last", "bf16", "fp16"]
Model = Literal["demo", "cifar10"]
DTYPES = {"fp32": torch.float32, "channels_last": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Noise:
    """A training set of random pixels: speed does not depend on what they show."""

    def __init__(self, shape: tuple[int, ...], num_classes: int):
        self.images = torch.randint(0, 256, (256, *shape), dtype=torch.uint8)
        self.labels = torch.arange(256) % num_classes

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: list[int]) -> Tensor:
        return self.images[indices]


def network(model: Model) -> Denoiser:
    if model == "demo":
        return EDM().load(checkpoint.read(ROOT / "demo/base.safetensors"))
    torch.manual_seed(0)
    return EDM().build(MODELS["edm-cifar10-32x32-cond-vp"])


def sampling_of(mode: Mode, num_steps: int, batch: int) -> Sampling:
    precision = "fp32" if mode == "channels_last" else mode
    return Sampling(
        options=Heun(num_steps=num_steps),
        batch=batch,
        uint8="round",
        precision=precision,
        channels_last=mode == "channels_last",
    )


def bench_mode(
    model: Model, mode: Mode, num_steps: int, batch: int, images: int, repeats: int, device: torch.device
) -> dict[str, object]:
    net, family, world = network(model).to(device), EDM(), World(device=device)
    peak = matmul_flops_per_second(device, DTYPES[mode])
    source = Source(
        family=family,
        sampling=sampling_of(mode, num_steps, batch),
        labels="balanced",
        first_seed=0,
        num_classes=family.num_classes(net),
    )

    def sample() -> None:
        list(generate(source, net, [range(batch)], device))

    reset_peak(device)
    flops = flops_of(sample)  # also the rehearsal
    seconds = seconds_of(sample, device, repeats)
    row: dict[str, object] = {"mode": mode, "matmul_gflops_per_s": peak / 1e9}
    row["sampling"] = {
        "images_per_s": batch / seconds,
        "share_of_matmul_rate": flops / seconds / peak,
        "peak_mib": peak_mib(device),
    }
    if model == "demo" and images:
        reference = read_reference(ROOT / "demo/reference_fashion-cnn.npz")
        yardstick = Yardstick(extractor=open_extractor("fashion-cnn", path=None, device=device), reference=reference)
        row["metric"] = evaluate(source, net, images, [yardstick], world).metrics
    row["finetune"] = bench_finetune(net, family, mode, batch, repeats, world, peak)
    return row


def bench_finetune(
    net: Denoiser, family: EDM, mode: Mode, batch: int, repeats: int, world: World, peak: float
) -> dict[str, float]:
    recipe = Training(
        images=10**9,
        batch=batch,
        lr=1e-5,
        ema_halflife_images=500_000,
        objective=Objective(),
        precision="fp32" if mode == "channels_last" else mode,
        channels_last=mode == "channels_last",
    )
    if recipe.channels_last:
        net.to(memory_format=torch.channels_last)
    trainer = Trainer(family, net.requires_grad_(True), recipe, world)
    size = family.img_size(net)
    corpus = Noise((net.img_channels, size, size), family.num_classes(net))
    reset_peak(world.device)
    flops = flops_of(lambda: train_step(trainer, corpus))
    seconds = seconds_of(lambda: train_step(trainer, corpus), world.device, repeats)
    return {
        "images_per_s": batch / seconds,
        "share_of_matmul_rate": flops / seconds / peak,
        "peak_mib": peak_mib(world.device),
    }


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True)
@click.option("--model", type=click.Choice(get_args(Model)), default="demo", show_default=True)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(get_args(Mode)),
    multiple=True,
    default=("fp32", "channels_last"),
    show_default=True,
)
@click.option("--num-steps", type=int, help="Heun steps.  [default: 8 for demo, 18 for cifar10]")
@click.option("--batch", default=64, show_default=True)
@click.option("--images", default=1000, show_default=True, help="For the metric; 0: none.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    device: str,
    model: Model,
    modes: tuple[Mode, ...],
    num_steps: int | None,
    batch: int,
    images: int,
    repeats: int,
    out: Path | None,
) -> None:
    where = torch.device(device)
    steps = num_steps or (8 if model == "demo" else 18)
    result = about(where) | {"model": model, "num_steps": steps, "batch": batch, "images": images}
    result["modes"] = [bench_mode(model, mode, steps, batch, images, repeats, where) for mode in modes]
    publish(result, out)


if __name__ == "__main__":
    main()
