"""Time xAR's sampler at the published size: images per second, peak memory and the fast mode's error on the latents.

\b
    python scripts/bench/xar.py --out results/bench/xar_base_cpu.json
    python scripts/bench/xar.py --device cuda --model xar_large --batch 64 --num-steps 50 \\
        --out results/bench/xar_large_cuda.json

Random weights (speed does not depend on them); exact (fp32) and fast (bf16 autocast). The fast mode's error is the root
mean square difference of the latents over their standard deviation, from the same noise. The autoencoder is not
included. With fewer steps than published (the default, for a CPU) the published number of images per second is computed
from the time per network call.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from measuring import about, flops_of, matmul_flops_per_second, peak_mib, publish, reset_peak, seconds_of
from torch import Tensor

from neon.runtime.precision import Precision, arithmetic
from neon.seeds import image_rng
from xar.presets import CFG_SCALE, NUM_STEPS, SIZES
from xar.sampler import sample_cells
from xar.transformer import XARTransformer


def random_network(name: str, device: torch.device) -> XARTransformer:
    torch.manual_seed(0)
    with torch.device(device):
        return XARTransformer(SIZES[name]).eval().requires_grad_(False)


def network_calls(num_steps: int) -> int:
    return 4 * num_steps + 3


@torch.inference_mode()
def sample(
    model: XARTransformer, batch: int, num_steps: int, cfg_scale: float, precision: Precision, device: torch.device
) -> Tensor:
    """The latents."""
    labels = torch.arange(batch, device=device) % model.num_classes
    with arithmetic(device, precision):
        return sample_cells(model, image_rng(0, range(batch), device), labels, num_steps=num_steps, cfg_scale=cfg_scale)


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True)
@click.option("--model", default="xar_base", type=click.Choice(list(CFG_SCALE["neon"])), show_default=True)
@click.option("--batch", type=int, default=2, show_default=True)
@click.option(
    "--num-steps",
    type=int,
    default=4,
    show_default=True,
    help="Steps per cell; published: 40 (xar_base), 50 (xar_large).",
)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(device: str, model: str, batch: int, num_steps: int, out: Path) -> None:
    where = torch.device(device)
    result = about(where) | {
        "model": model,
        "batch": batch,
        "num_steps": num_steps,
        "published_num_steps": NUM_STEPS[model],
    }
    result["matmul_gflops_per_s"] = (peak := matmul_flops_per_second(where)) / 1e9
    network, cfg_scale = random_network(model, where), CFG_SCALE["neon"][model]
    flops = flops_of(lambda: sample(network, batch, num_steps, cfg_scale, "fp32", where))  # also the rehearsal
    share = network_calls(num_steps) / network_calls(NUM_STEPS[model])
    modes: tuple[Precision, ...] = ("fp32", "bf16")
    rows, latents = [], []
    for precision in modes:
        reset_peak(where)
        seconds = seconds_of(
            lambda p=precision: latents.append(sample(network, batch, num_steps, cfg_scale, p, where)), where
        )
        row = {"precision": precision, "seconds": seconds, "images_per_s": batch / seconds, "peak_mib": peak_mib(where)}
        row |= {
            "share_of_fp32_matmul_rate": flops / seconds / peak,
            "images_per_s_at_published_steps": batch / seconds * share,
        }
        rows.append(row)
        click.echo(json.dumps(row), err=True)
    exact, fast = (made.double() for made in latents)
    error = ((fast - exact).square().mean().sqrt() / exact.std()).item()
    result |= {"cfg_scale": cfg_scale, "gflop": flops / 1e9, "rows": rows, "fast_mode_relative_error": error}
    publish(result, out)


if __name__ == "__main__":
    main()
