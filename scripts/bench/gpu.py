"""Every family at its published size on one GPU, in minutes: images per second in each mode, errors, memory.

\b
    python scripts/bench/gpu.py --out results/bench/gpu_h100.json
    python scripts/bench/gpu.py --device cpu --tiny --out /tmp/gpu.json      (what CI runs)

Random weights (speed does not depend on them). Rows are written as they are measured; a run that was cut goes on with
the rows that are missing, and rows that do not fit into --minutes are named as dropped. Per network:

\b
    plain      the module as the published script runs it: its precision, no graphs, nothing compiled
    exact      the same precision by our sampler with speed = "exact"; must give the same numbers as plain
    fp32       exact float32, our default
    compiled   the published precision with speed = "compiled"
    fast       speed = "fast"

`error` is the root mean square difference to fp32 over the standard deviation (for tokens: the share that differs).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from measuring import about, matmul_flops_per_second, peak_mib, reset_peak
from torch import Tensor, nn

from edm.presets import MODELS
from fid.inception import InceptionV3
from flow.presets import CIFAR10
from imm.presets import IMAGENET256
from neon import config_table
from neon.config_table import table_of
from neon.family import Family, resolve
from neon.pipeline.experiment import parse
from neon.runtime.distributed import World
from neon.runtime.precision import Precision, arithmetic
from neon.sampling.generate import Source, generate, to_images
from neon.sampling.options import Sampling
from neon.seeds import image_rng
from neon.training.loop import train_step
from neon.training.recipe import Training
from neon.training.trainer import Trainer
from var.presets import PATCH_NUMS, published
from xar.presets import SIZES

REPEATS = 3
Row = dict[str, object]
exact_codes: dict[str, Tensor] = {}
"""By family: what every other mode is compared with."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family at one size: how to build it, how to sample it, and the precision of the published script."""

    family: str
    arch: Mapping[str, object]
    batch: int
    sampling: dict[str, object]
    precision: Precision
    cfg_scale: float | None = None
    autoencoder: dict[str, object] | None = None


FULL = {
    "imm_xl": Case(
        family="imm", arch=dict(IMAGENET256), batch=32, sampling={"num_steps": 1}, precision="tf32", cfg_scale=1.5
    ),
    "var_d16": Case(
        family="var",
        arch=table_of(config_table.to_plain(published("d16")), "arch"),
        batch=32,
        sampling={"top_k": 900, "top_p": 0.95},
        precision="fp16",
        cfg_scale=2.8,
        autoencoder={"patch_nums": PATCH_NUMS[256]},
    ),
    "edm_cifar10": Case(
        family="edm",
        arch=dict(MODELS["edm-cifar10-32x32-cond-vp"]),
        batch=128,
        sampling={"num_steps": 5},
        precision="cudnn-tf32",
    ),
    "xar_base": Case(
        family="xar",
        arch=table_of(config_table.to_plain(SIZES["xar_base"]), "arch"),
        batch=16,
        sampling={"num_steps": 5},
        precision="fp16",
        cfg_scale=3.8,
        autoencoder={},
    ),
    "flow_cifar10": Case(
        family="flow", arch=CIFAR10, batch=128, sampling={"solver": "euler", "num_steps": 10}, precision="cudnn-tf32"
    ),
}


TINY = {
    "edm": Case(
        family="edm",
        arch={
            **MODELS["edm-cifar10-32x32-cond-vp"],
            "img_resolution": 8,
            "model_channels": 16,
            "channel_mult": [1],
            "num_blocks": 1,
        },
        batch=2,
        sampling={"num_steps": 2},
        precision="cudnn-tf32",
    ),
    "var": Case(
        family="var",
        arch={
            "depth": 2,
            "embed_dim": 32,
            "heads": 2,
            "patch_nums": [1, 2, 4],
            "num_classes": 10,
            "vocabulary": 32,
            "code_width": 8,
        },
        batch=2,
        sampling={"top_k": 0, "top_p": 0.0},
        precision="bf16",
        cfg_scale=1.5,
        autoencoder={
            "ch": 32,
            "ch_mult": [1, 1, 1],
            "num_res_blocks": 1,
            "z_channels": 8,
            "vocab_size": 32,
            "patch_nums": [1, 2, 4],
        },
    ),
}
"""What CI runs on a CPU: that every row works, not how fast."""


def rows_of(cases: dict[str, Case], device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Name and measurement of every row, the most telling ones first."""
    built: dict[str, tuple[Family, nn.Module]] = {}

    def network(name: str) -> tuple[Family, nn.Module]:
        if name not in built:
            built.clear()  # one network at a time on the card
            torch.cuda.empty_cache()
            built[name] = build(cases[name], device)
        return built[name]

    for name, case in cases.items():
        for mode in ("plain", "exact", "fp32", "fast", "compiled"):
            yield f"{name}/{mode}", lambda n=name, c=case, m=mode: sample_row(*network(n), c, m, device)
        for mode in ("exact", "fast", "compiled") if case.autoencoder is not None else ():
            yield f"{name}/decode-{mode}", lambda n=name, c=case, m=mode: decode_row(*network(n), c, m, device)
        if case.family == "edm":
            yield f"{name}/train", lambda n=name, c=case: train_row(*network(n), c, device)
            for mode in ("fp32", "fp32 channels_last", "tf32"):
                yield f"inception/{mode}", lambda m=mode: inception_row(m, device)


def build(case: Case, device: torch.device) -> tuple[Family, nn.Module]:
    """A fresh network's output is nearly zero, which would hide the errors: all its weights are drawn."""
    family = resolve(case.family)
    torch.manual_seed(0)
    with torch.device(device):
        model = family.build(case.arch)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=(parameter.numel() / len(parameter)) ** -0.5)
    if case.autoencoder is not None and family.trainable_autoencoder is not None:
        with torch.device(device):
            family.use(family.trainable_autoencoder.build(case.autoencoder))  # var and xar
    return family, model.to(device).eval().requires_grad_(False)


def source_of(family: Family, model: nn.Module, case: Case, mode: str) -> Source:
    precision = "fp32" if mode in ("fp32", "fast") else case.precision
    table = {"uint8": "round", "batch": case.batch, "precision": precision, **case.sampling}
    table["speed"] = mode if mode in ("compiled", "fast") else "exact"
    sampling = parse({"family": case.family, "sampling": table}).need("sampling", Sampling)
    return Source(
        family=family,
        sampling=sampling,
        labels="balanced",
        first_seed=0,
        num_classes=family.num_classes(model),
        cfg_scale=case.cfg_scale,
    )


@torch.inference_mode()
def plain(family: Family, model: nn.Module, case: Case, source: Source, device: torch.device) -> Tensor:
    rng = image_rng(0, range(case.batch), device)
    classes = source.num_classes
    labels = torch.tensor([i % classes for i in range(case.batch)], device=device) if classes else None
    with arithmetic(device, case.precision):
        return family.sample(model, rng, labels, source.options)[0]


def sample_row(family: Family, model: nn.Module, case: Case, mode: str, device: torch.device) -> Row:
    source = source_of(family, model, case, mode)

    def once() -> Tensor:
        if mode == "plain":
            return plain(family, model, case, source, device)
        return next(generate(source, model, [range(case.batch)], device)).codes

    row = timed(once, device, case.batch)
    codes = once()
    if case.family not in exact_codes:
        exact = source_of(family, model, case, "fp32")
        exact_codes[case.family] = next(generate(exact, model, [range(case.batch)], device)).codes
    row["error"] = difference(codes, exact_codes[case.family])
    if mode == "exact":
        row["equals_plain"] = torch.equal(codes, plain(family, model, case, source, device))
    return row


def decode_row(family: Family, model: nn.Module, case: Case, mode: str, device: torch.device) -> Row:
    source = source_of(family, model, case, mode)
    codes = next(generate(source_of(family, model, case, "exact"), model, [range(case.batch)], device)).codes
    row = timed(lambda: to_images(source, codes), device, case.batch)
    exact = to_images(source_of(family, model, case, "fp32"), codes)
    return row | {"error_grey_levels": (to_images(source, codes).float() - exact.float()).abs().mean().item()}


@torch.inference_mode()
def inception_row(mode: str, device: torch.device) -> Row:
    torch.manual_seed(0)
    with torch.device(device):
        network = InceptionV3().eval()
    images = torch.rand(32 if device.type == "cpu" else 256, 3, 299, 299, device=device) * 2 - 1
    if mode.endswith("channels_last"):
        network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    images = images[:2] if device.type == "cpu" else images
    with arithmetic(device, "tf32" if mode == "tf32" else "fp32"):
        return timed(lambda: network(images), device, len(images))


def train_row(family: Family, model: nn.Module, case: Case, device: torch.device) -> Row:
    """One update of the fine-tune, codes in memory."""
    pixels = to_images(
        source_of(family, model, case, "fp32"),
        plain(family, model, case, source_of(family, model, case, "plain"), device),
    ).cpu()

    class Noise:
        labels = torch.arange(1024) % max(family.num_classes(model), 1)

        def __len__(self) -> int:
            return 1024

        def read(self, indices: object, /) -> Tensor:
            return pixels

    recipe_table = {"images": 1 << 20, "batch": case.batch, "lr": 1e-5}
    recipe = parse({"family": case.family, "finetune": recipe_table}).need("finetune", Training)
    trainer = Trainer(family, model.requires_grad_(True), recipe, World(device=device))
    row = timed(lambda: train_step(trainer, Noise()), device, case.batch)
    model.requires_grad_(False)
    return row


def timed(action: Callable[[], object], device: torch.device, images: int) -> Row:
    """Seconds of the first calls (compilation, capture) apart from those of the next ones."""
    reset_peak(device)
    synchronise(device)
    started = time.perf_counter()
    for _ in range(4 if device.type == "cuda" else 1):  # graphs are captured in the fourth call
        action()
    synchronise(device)
    first_s = time.perf_counter() - started
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    seconds.sort()
    rates = {"min": images / seconds[-1], "median": images / seconds[len(seconds) // 2], "max": images / seconds[0]}
    return {"images_per_s": rates, "first_calls_s": first_s, "batch": images, "peak_mib": peak_mib(device)}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def difference(codes: Tensor, exact: Tensor) -> float:
    if not codes.is_floating_point():
        return (codes != exact).double().mean().item()
    return ((codes.double() - exact.double()).square().mean().sqrt() / exact.double().std()).item()


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True)
@click.option("--minutes", type=float, default=8.0, show_default=True, help="Later rows are dropped when these end.")
@click.option("--tiny", is_flag=True, help="Small networks, for a CPU.")
@click.option("--only", multiple=True, help="Rows whose name begins so.  [default: all]")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(device: str, minutes: float, tiny: bool, only: tuple[str, ...], out: Path) -> None:
    where, started = torch.device(device), time.monotonic()
    header = about(where)
    header["matmul_tflops"] = {
        name: matmul_flops_per_second(where, dtype) / 1e12
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    result = json.loads(out.read_text()) if out.is_file() else {"header": header, "rows": {}, "failed": {}}
    result["dropped"] = []
    for name, measure in rows_of(TINY if tiny else FULL, where):
        if name in result["rows"] or (only and not name.startswith(only)):
            continue
        if time.monotonic() - started > 60 * minutes:
            result["dropped"].append(name)
            continue
        try:
            result["rows"][name] = measure()
            result["failed"].pop(name, None)
        except (RuntimeError, ValueError) as error:  # the other rows are still worth having
            result["failed"][name] = f"{type(error).__name__}: {str(error)[:500]}"
        click.echo(json.dumps({name: result["rows"].get(name, result["failed"].get(name))}), err=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    result["goals"] = goals(result["rows"])
    out.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(
        json.dumps({"rows": len(result["rows"]), **{key: result[key] for key in ("failed", "dropped", "goals")}})
    )
    if result["failed"]:
        raise SystemExit(1)


def goals(rows: dict[str, Row]) -> dict[str, dict[str, object]]:
    """Per network: twice the plain path's speed at the published precision (compiled), four times in the fast mode."""
    found: dict[str, dict[str, object]] = {}
    for name in {name.split("/")[0] for name in rows}:
        speeds = {
            mode: row["images_per_s"]["median"]  # a dictionary, made by `timed`
            for mode in ("plain", "exact", "compiled", "fast")
            if (row := rows.get(f"{name}/{mode}")) is not None
        }
        if "plain" in speeds:
            ratios = {mode: speed / speeds["plain"] for mode, speed in speeds.items()}
            found[name] = {
                "times_plain": ratios,
                "exact_equals_plain": rows.get(f"{name}/exact", {}).get("equals_plain"),
                "2x_at_published_precision": max(ratios.get("exact", 0), ratios.get("compiled", 0)) >= 2,
                "4x_fast": ratios.get("fast", 0) >= 4,
            }
    return found


if __name__ == "__main__":
    main()
