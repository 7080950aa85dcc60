"""Time VAR's sampler at a published size: images per second and peak memory at several batch sizes.

\b
    python scripts/bench/var.py --fast-batches 1 --out results/bench/var_d16_cpu.json
    python scripts/bench/var.py --device cuda --out results/bench/var_d16_cuda.json

Random weights (speed does not depend on them), exact (fp32) and fast (bf16 autocast), guided, without the decoder. The
fast mode's error is the largest difference of the logits on the same tokens. One image of d16 takes about 35 processor
seconds in fp32 on a CPU.
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
from var.options import Sampling
from var.presets import CFG_SCALE, IMAGE_SIDE, published
from var.quantizer import MultiScaleQuantizer
from var.sampler import sample_scales
from var.transformer import Transformer


def random_networks(name: str, device: torch.device) -> tuple[Transformer, MultiScaleQuantizer]:
    """The published architecture. A fresh network's logits are almost 0, which would hide the fast mode's error: all
    weights are drawn."""
    arch = published(name)
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(arch)
        quantizer = MultiScaleQuantizer(
            vocab_size=arch.vocabulary, z_channels=arch.code_width, patch_nums=arch.patch_nums
        )
    for parameter in [*model.parameters(), quantizer.embedding.weight]:
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=(parameter.numel() / len(parameter)) ** -0.5)
    return model.eval().requires_grad_(False), quantizer.requires_grad_(False)


@torch.inference_mode()
def sample(
    model: Transformer,
    quantizer: MultiScaleQuantizer,
    batch: int,
    precision: Precision,
    how: Sampling,
    device: torch.device,
) -> list[Tensor]:
    """The tokens of every scale."""
    labels = torch.arange(batch, device=device) % model.num_classes
    with arithmetic(device, precision):
        return [
            scale.indices for scale in sample_scales(model, quantizer, image_rng(0, range(batch), device), labels, how)
        ]


@torch.inference_mode()
def logit_error(
    model: Transformer, quantizer: MultiScaleQuantizer, indices: list[Tensor], device: torch.device
) -> dict[str, float]:
    """Of the fast mode on one image's tokens, beside the spread of the exact logits."""
    labels, features = (
        torch.zeros(1, dtype=torch.int64, device=device),
        quantizer.teacher_input([index[:1] for index in indices]),
    )
    exact = model(labels, features)
    with arithmetic(device, "bf16"):
        fast = model(labels, features)
    return {"largest_logit_difference": (fast - exact).abs().max().item(), "logit_std": exact.std().item()}


@torch.inference_mode()
def plain_seconds(
    model: Transformer, quantizer: MultiScaleQuantizer, indices: list[Tensor], device: torch.device
) -> float:
    """The plain way for one image: every scale is a pass over all tokens so far, twice for guidance, nothing
    remembered."""
    labels = torch.arange(2, device=device) * model.num_classes  # class 0 and no class
    tokens = quantizer.teacher_input([index[:1].expand(2, -1) for index in indices])

    def passes() -> None:
        for scale in range(len(indices)):
            known = sum(index.shape[1] for index in indices[: scale + 1]) - indices[0].shape[1]
            model(labels, tokens[:, :known])

    return seconds_of(passes, device)


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True)
@click.option("--model", default="d16", type=click.Choice(list(IMAGE_SIDE)), show_default=True)
@click.option("--batches", type=int, multiple=True, default=(1, 8, 32), show_default=True)
@click.option(
    "--fast-batches",
    type=int,
    multiple=True,
    help="For bf16, which a CPU without its instructions only imitates.  [default: --batches]",
)
@click.option("--repeats", type=int, default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    device: str, model: str, batches: tuple[int, ...], fast_batches: tuple[int, ...], repeats: int, out: Path
) -> None:
    where = torch.device(device)
    how = Sampling(cfg_scale=CFG_SCALE["neon"][IMAGE_SIDE[model]])
    result = about(where) | {"model": model, "cfg_scale": how.cfg_scale, "top_k": how.top_k, "top_p": how.top_p}
    result["matmul_gflops_per_s"] = (peak := matmul_flops_per_second(where)) / 1e9
    network, quantizer = random_networks(model, where)
    flops = flops_of(lambda: sample(network, quantizer, 1, "fp32", how, where))  # also the rehearsal
    modes: tuple[tuple[Precision, tuple[int, ...]], ...] = (("fp32", batches), ("bf16", fast_batches or batches))
    rows = []
    for precision, sizes in modes:
        for batch in sizes:
            reset_peak(where)
            seconds = seconds_of(
                lambda b=batch, p=precision: sample(network, quantizer, b, p, how, where), where, repeats
            )
            row = {
                "precision": precision,
                "batch": batch,
                "images_per_s": batch / seconds,
                "seconds": seconds,
                "peak_mib": peak_mib(where),
            }
            rows.append(row | {"share_of_fp32_matmul_rate": flops * batch / seconds / peak})
            click.echo(json.dumps(rows[-1]), err=True)
    indices = sample(network, quantizer, 1, "fp32", how, where)
    result |= {
        "gflop_per_image": flops / 1e9,
        "rows": rows,
        "fast_mode": logit_error(network, quantizer, indices, where),
    }
    result["plain_seconds_per_image"] = plain_seconds(network, quantizer, indices, where)
    publish(result, out)


if __name__ == "__main__":
    main()
