"""Time xAR's sampler at the published size: images per second, peak memory and the fast mode's error on the latents.

    python scripts/bench/xar.py --out results/bench/xar.json
    python scripts/bench/xar.py --device cuda --model xar_large --batch 64 --num-steps 50 --out results/bench/xar_large.json

Random weights (speed does not depend on them); exact (fp32) and fast (bf16 autocast). The fast mode's error is the root mean square
difference of the latents over their standard deviation, from the same noise. The autoencoder is not included. With fewer steps
than published (the default, for a CPU) the published number of images per second is computed from the time per network call.
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
from xar.presets import CFG_SCALE, NUM_STEPS, SIZES  # noqa: E402
from xar.sampler import sample_cells  # noqa: E402
from xar.transformer import XARTransformer  # noqa: E402


def random_network(name: str, device: torch.device) -> XARTransformer:
    torch.manual_seed(0)
    with torch.device(device):
        return XARTransformer(SIZES[name]).eval().requires_grad_(False)


def network_calls(num_steps: int) -> int:
    return 4 * num_steps + 3


@torch.inference_mode()
def measure(
    model: XARTransformer, batch: int, num_steps: int, cfg_scale: float, precision: Precision, device: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Time and memory of one batch, and its latents. Peak memory on a CPU is that of the process so far."""
    labels = torch.arange(batch, device=device) % model.num_classes
    for is_rehearsal in ([True] if device.type == "cuda" else []) + [False]:  # on CUDA the first call chooses kernels
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start, processor_start = time.perf_counter(), time.process_time()
        with autocast(device, precision):
            latents = sample_cells(
                model, image_rng(0, range(batch), device), labels, num_steps=2 if is_rehearsal else num_steps, cfg_scale=cfg_scale
            )
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall, processor = time.perf_counter() - start, time.process_time() - processor_start
    is_cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**20 if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {"seconds": wall, "processor_seconds": processor, "images_per_second": batch / wall}
    row["seconds_per_network_call"] = wall / network_calls(num_steps)
    return row | {"peak_mib": peak, "load_average": os.getloadavg()[0]}, latents


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True)
@click.option("--model", default="xar_base", type=click.Choice(list(CFG_SCALE["neon"])), show_default=True)
@click.option("--batch", type=int, default=2, show_default=True)
@click.option("--num-steps", type=int, default=4, show_default=True, help="Steps per cell; published: 40 (xar_base), 50 (xar_large).")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(device: str, model: str, batch: int, num_steps: int, out: Path) -> None:
    where = torch.device(device)
    network, cfg_scale = random_network(model, where), CFG_SCALE["neon"][model]
    modes: tuple[Precision, ...] = ("fp32", "bf16")
    rows, latents = [], []
    for precision in modes:
        row, made = measure(network, batch, num_steps, cfg_scale, precision, where)
        share = network_calls(num_steps) / network_calls(NUM_STEPS[model])
        rows.append({"precision": precision, **row, "images_per_second_at_published_steps": row["images_per_second"] * share})
        latents.append(made.double())
        click.echo(json.dumps(rows[-1]), err=True)
    exact, fast = latents
    result = {
        "model": model,
        "batch": batch,
        "num_steps": num_steps,
        "published_num_steps": NUM_STEPS[model],
        "cfg_scale": cfg_scale,
        "device": torch.cuda.get_device_name() if where.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fast_mode_error": ((fast - exact).square().mean().sqrt() / exact.std()).item(),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
