"""Time IMM's sampler at the published size: images per second and peak memory at 1, 2, 4 and 8 guided steps.

\b
    python scripts/bench/imm.py --out results/bench/imm_cpu.json
    python scripts/bench/imm.py --device cuda --batch 64 --out results/bench/imm_cuda.json

DiT-XL/2 with random weights (speed does not depend on them), exact (fp32) and fast (bf16 autocast); the fast mode's
error is the root mean square difference of the latents over their standard deviation, from the same noise. The
autoencoder is not included. About five minutes on 2 idle CPU cores.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from measuring import about, flops_of, matmul_flops_per_second, peak_mib, publish, reset_peak, seconds_of
from torch import Tensor

from imm.family import IMM
from imm.options import Sampling
from imm.precond import IMMPrecond
from imm.presets import CFG_SCALE, IMAGENET256
from neon.runtime.precision import Precision, arithmetic
from neon.seeds import image_rng


def random_network(model_type: str, device: torch.device) -> IMMPrecond:
    """The published architecture. A fresh network's output is zero, which would hide the fast mode's error: all weights
    are drawn."""
    torch.manual_seed(0)
    with torch.device(device):
        net = IMM().build({**IMAGENET256, "model_type": model_type})
    for parameter in net.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=(parameter.numel() / len(parameter)) ** -0.5)
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def sample(net: IMMPrecond, batch: int, steps: int, precision: Precision, device: torch.device) -> Tensor:
    labels = torch.arange(batch, device=device) % net.label_dim
    with arithmetic(device, precision):
        codes, _ = IMM().sample(
            net, image_rng(0, range(batch), device), labels, Sampling(num_steps=steps, cfg_scale=CFG_SCALE["neon"])
        )
    return codes


def measure(
    net: IMMPrecond, batch: int, steps: int, precision: Precision, repeats: int, device: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Time and memory of the fastest of `repeats` calls, and the latents."""
    made: list[Tensor] = []
    reset_peak(device)
    seconds = seconds_of(lambda: made.append(sample(net, batch, steps, precision, device)), device, repeats)
    return {"seconds": seconds, "images_per_s": batch / seconds, "peak_mib": peak_mib(device)}, made[-1].float()


@click.command(help=__doc__)
@click.option("--device", default="cpu")
@click.option("--model_type", default="DiT_XL_2")
@click.option("--batch", type=int, default=1, show_default=True)
@click.option("--repeats", type=int, default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(device: str, model_type: str, batch: int, repeats: int, out: Path) -> None:
    where = torch.device(device)
    result = about(where) | {"model": model_type, "batch": batch, "repeats": repeats, "cfg_scale": CFG_SCALE["neon"]}
    result["matmul_gflops_per_s"] = (peak := matmul_flops_per_second(where)) / 1e9
    net = random_network(model_type, where)
    flops = flops_of(lambda: sample(net, batch, 1, "fp32", where))  # also the rehearsal
    rows = []
    for steps in (1, 2, 4, 8):
        exact, reference = measure(net, batch, steps, "fp32", repeats, where)
        fast, codes = measure(net, batch, steps, "bf16", repeats, where)
        exact["share_of_matmul_rate"] = flops * steps / exact["seconds"] / peak
        fast["relative_error"] = ((codes - reference).square().mean().sqrt() / reference.std()).item()
        rows.append({"steps": steps, "exact_fp32": exact, "fast_bf16": fast})
        click.echo(json.dumps(rows[-1]), err=True)
    publish(result | {"gflop_per_step": flops / 1e9, "rows": rows}, out)


if __name__ == "__main__":
    main()
