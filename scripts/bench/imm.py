"""Time IMM's sampler at the published size: images per second and peak memory at 1, 2, 4 and 8 guided steps.

    python scripts/bench/imm.py --out results/bench/imm.json
    python scripts/bench/imm.py --device cuda --batch 64 --out results/bench/imm.json

DiT-XL/2 with random weights (speed does not depend on them), exact (fp32) and fast (bf16 autocast); the fast mode's error is the
root mean square difference of the latents over their standard deviation, from the same noise. The autoencoder is not included.
About five minutes on 2 idle CPU cores.
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

from imm.family import IMM, Sampling  # noqa: E402
from imm.precond import IMMPrecond  # noqa: E402
from imm.presets import CFG_SCALE, IMAGENET256  # noqa: E402
from neon.config import Precision  # noqa: E402
from neon.generate import autocast  # noqa: E402
from neon.seeds import image_rng  # noqa: E402


def random_network(model_type: str, device: torch.device) -> IMMPrecond:
    """The published architecture. A fresh network's output is zero, which would hide the fast mode's error: all weights are drawn."""
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
    with autocast(device, precision):
        codes, _ = IMM().sample(net, image_rng(0, range(batch), device), labels, Sampling(num_steps=steps, cfg_scale=CFG_SCALE["neon"]))
    return codes


def measure(
    net: IMMPrecond, batch: int, steps: int, precision: Precision, repeats: int, device: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Seconds of the fastest of `repeats` calls (the others were disturbed), and the latents."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        codes = sample(net, batch, steps, precision, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "images_per_second": batch / min(seconds), "peak_mib": peak_mib(device)}, codes.float()


def peak_mib(device: torch.device) -> float:
    """CUDA: of this measurement. CPU: of the process so far, weights and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@click.command(help=__doc__)
@click.option("--device", default="cpu")
@click.option("--model_type", default="DiT_XL_2")
@click.option("--batch", type=int, default=1, show_default=True)
@click.option("--repeats", type=int, default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(device: str, model_type: str, batch: int, repeats: int, out: Path) -> None:
    where = torch.device(device)
    net = random_network(model_type, where)
    sample(net, batch, 1, "fp32", where)  # the first call allocates and chooses kernels
    rows = []
    for steps in (1, 2, 4, 8):
        exact, reference = measure(net, batch, steps, "fp32", repeats, where)
        fast, codes = measure(net, batch, steps, "bf16", repeats, where)
        error = ((codes - reference).square().mean().sqrt() / reference.std()).item()
        rows.append({"steps": steps, "exact_fp32": exact, "fast_bf16": {**fast, "relative_error": error}})
        click.echo(json.dumps(rows[-1]), err=True)
    result = {
        "model": model_type,
        "batch": batch,
        "repeats": repeats,
        "cfg_scale": CFG_SCALE["neon"],
        "device": torch.cuda.get_device_name() if where.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
