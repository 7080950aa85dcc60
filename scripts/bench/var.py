"""Time VAR's sampler at a published size: images per second and peak memory at several batch sizes.

    python scripts/bench/var.py --batches 1 --batches 8 --batches 32 --out results/bench/var_d16.json
    python scripts/bench/var.py --device cuda --out results/bench/var_d16_cuda.json

Random weights (speed does not depend on them), exact (fp32) and fast (bf16 autocast), guided, without the decoder. The fast mode's
error is the largest difference of the logits on the same tokens. One image of d16 takes about 35 processor seconds in fp32 on a CPU.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

import click
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from neon.config import Precision  # noqa: E402
from neon.generate import autocast  # noqa: E402
from neon.seeds import image_rng  # noqa: E402
from var.presets import CFG_SCALE, IMAGE_SIDE, published  # noqa: E402
from var.quantizer import MultiScaleQuantizer  # noqa: E402
from var.sampler import Sampling, sample_scales  # noqa: E402
from var.transformer import Transformer  # noqa: E402


def random_networks(name: str, device: torch.device) -> tuple[Transformer, MultiScaleQuantizer]:
    """The published architecture. A fresh network's logits are almost 0, which would hide the fast mode's error: all weights are drawn."""
    arch = published(name)
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(arch)
        quantizer = MultiScaleQuantizer(vocab_size=arch.vocabulary, z_channels=arch.code_width, patch_nums=arch.patch_nums)
    for parameter in [*model.parameters(), quantizer.embedding.weight]:
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=(parameter.numel() / len(parameter)) ** -0.5)
    return model.eval().requires_grad_(False), quantizer.requires_grad_(False)


@torch.inference_mode()
def sample(
    model: Transformer, quantizer: MultiScaleQuantizer, batch: int, precision: Precision, how: Sampling, device: torch.device
) -> list[Tensor]:
    """The tokens of every scale."""
    labels = torch.arange(batch, device=device) % model.num_classes
    with autocast(device, precision):
        return [scale.indices for scale in sample_scales(model, quantizer, image_rng(0, range(batch), device), labels, how)]


@torch.inference_mode()
def logit_error(model: Transformer, quantizer: MultiScaleQuantizer, indices: list[Tensor], device: torch.device) -> dict[str, float]:
    """Of the fast mode on one image's tokens, beside the spread of the exact logits."""
    labels, features = torch.zeros(1, dtype=torch.int64, device=device), quantizer.teacher_input([index[:1] for index in indices])
    exact = model(labels, features)
    with autocast(device, "bf16"):
        fast = model(labels, features)
    return {"largest_logit_difference": (fast - exact).abs().max().item(), "logit_std": exact.std().item()}


def peak_mib(device: torch.device) -> float:
    """CUDA: of this measurement. CPU: of the process so far, weights and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(
    model: Transformer, quantizer: MultiScaleQuantizer, batch: int, precision: Precision, repeats: int, how: Sampling, device: torch.device
) -> tuple[dict[str, object], list[Tensor]]:
    """Time and memory of the fastest of `repeats` calls (the others were disturbed), and the tokens."""
    seconds = []
    for _ in range(repeats + (device.type == "cuda")):  # on CUDA the first call chooses kernels
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start, processor_start = time.perf_counter(), time.process_time()
        indices = sample(model, quantizer, batch, precision, how, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start, time.process_time() - processor_start))
    wall, processor = min(seconds)
    row = {"batch": batch, "precision": precision, "seconds": wall, "processor_seconds": processor, "images_per_second": batch / wall}
    return row | {"peak_mib": peak_mib(device), "load_average": os.getloadavg()[0]}, indices


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True)
@click.option("--model", default="d16", type=click.Choice(list(IMAGE_SIDE)), show_default=True)
@click.option("--batches", type=int, multiple=True, default=(1, 8, 32), show_default=True)
@click.option("--repeats", type=int, default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(device: str, model: str, batches: tuple[int, ...], repeats: int, out: Path) -> None:
    where = torch.device(device)
    network, quantizer = random_networks(model, where)
    how = Sampling(cfg_scale=CFG_SCALE["neon"][IMAGE_SIDE[model]])
    modes: tuple[Precision, ...] = ("fp32", "bf16")
    rows = []
    for batch in batches:
        for precision in modes:
            row, indices = measure(network, quantizer, batch, precision, repeats, how, where)
            rows.append(row)
            click.echo(json.dumps(row), err=True)
    result = {
        "model": model,
        "sampling": {"cfg_scale": how.cfg_scale, "top_k": how.top_k, "top_p": how.top_p},
        "device": torch.cuda.get_device_name() if where.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fast_mode": logit_error(network, quantizer, indices, where),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
