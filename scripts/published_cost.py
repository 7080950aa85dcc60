"""What the published rows cost: images and floating-point operations of each config, counted on the networks.

    python scripts/published_cost.py        # writes results/published.json; a minute, no weights needed

One network call is counted with torch's FlopCounterMode on tensors without contents. A training image counts three
forward passes, IMM's four (its target is one more). Sampling counts the calls of the published sampler, twice where it
is guided.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from edm import presets as edm_presets  # noqa: E402
from flow import presets as flow_presets  # noqa: E402
from imm import presets as imm_presets  # noqa: E402
from neon.evaluation.options import Report  # noqa: E402
from neon.family import resolve  # noqa: E402
from neon.pipeline.experiment import Experiment, load  # noqa: E402
from neon.sampling.options import Synth  # noqa: E402
from neon.search.options import Select  # noqa: E402
from neon.training.recipe import Training  # noqa: E402
from var import presets as var_presets  # noqa: E402
from xar import presets as xar_presets  # noqa: E402

OUT = ROOT / "results" / "published.json"
H100_TFLOPS = {"fp32": 67.0, "tf32": 495.0, "bf16": 989.0, "fp16": 989.0}
"""Dense rates of one H100 SXM by its datasheet."""
SHARE = 0.3
"""Share of that rate which is assumed to be reached."""


@dataclass(frozen=True)
class Row:
    config: str
    title: str
    base: str
    neon: str
    calls: float
    """Network calls per image, unguided."""
    is_guided: bool
    forward: Callable[[], float]
    """GFLOP of one call per image."""
    passes: int = 3


def counted(build: Callable[[], nn.Module], call: Callable[[nn.Module], object]) -> float:
    # initial values do not exist here, and trunc_normal_ looks at them
    with FakeTensorMode(), torch.no_grad(), patch("torch.nn.init.trunc_normal_"):
        net = build().eval()
        with FlopCounterMode(display=False) as counter:
            call(net)
    return counter.get_total_flops() / 1e9


def edm(name: str) -> float:
    arch = edm_presets.MODELS[name]
    side, label_dim = int(arch["img_resolution"]), int(arch["label_dim"])

    def call(net: nn.Module) -> object:
        return net(
            torch.zeros(1, 3, side, side), torch.ones(1, 1, 1, 1), torch.zeros(1, label_dim) if label_dim else None
        )

    return counted(lambda: resolve("edm").build(arch), call)


def flow() -> float:
    build = partial(resolve("flow").build, flow_presets.MODELS["cifar10_uncond"])
    return counted(build, lambda net: net(torch.ones(1), torch.zeros(1, 3, 32, 32), None))


def imm() -> float:
    def call(net: nn.Module) -> object:
        times = torch.ones(1, 1, 1, 1)
        return net(torch.zeros(1, 4, 32, 32), times, times, torch.zeros(1, 1000))

    return counted(partial(resolve("imm").build, imm_presets.IMAGENET256), call)


def xar(name: str) -> float:
    """All four cells once."""

    def call(net: nn.Module) -> object:
        return net(torch.zeros(1, 4, 64, 16), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, dtype=torch.long))

    return counted(partial(resolve("xar").build, asdict(xar_presets.SIZES[name])), call)


def var(name: str) -> float:
    """All scales once."""
    arch = var_presets.published(name)
    tokens = sum(side**2 for side in arch.patch_nums[1:])

    def call(net: nn.Module) -> object:
        return net(torch.zeros(1, dtype=torch.long), torch.zeros(1, tokens, arch.code_width))

    return counted(partial(resolve("var").build, asdict(arch)), call)


def rows() -> list[Row]:
    cifar, ffhq = 35, 79
    found = [
        Row(
            "edm_cifar10_cond",
            "EDM, CIFAR-10, conditional",
            "1.78",
            "1.38",
            cifar,
            False,
            lambda: edm("edm-cifar10-32x32-cond-vp"),
        ),
        Row(
            "edm_cifar10_uncond",
            "EDM, CIFAR-10, unconditional",
            "1.98",
            "1.38",
            cifar,
            False,
            lambda: edm("edm-cifar10-32x32-uncond-vp"),
        ),
        Row("edm_ffhq64", "EDM, FFHQ-64", "2.39", "1.12", ffhq, False, lambda: edm("edm-ffhq-64x64-uncond-vp")),
        Row("flow_cifar10", "Flow matching, CIFAR-10", "3.50", "2.32", 100, False, flow),
        Row("xar_b_imagenet256", "xAR-B, ImageNet-256", "1.72", "1.31", 41, True, lambda: xar("xar_base")),
        Row("xar_l_imagenet256", "xAR-L, ImageNet-256", "1.28", "1.02", 51, True, lambda: xar("xar_large")),
        Row("var_d16_imagenet256", "VAR-d16, ImageNet-256", "3.30", "2.01", 1, True, lambda: var("d16")),
        Row("var_d36_imagenet512", "VAR-d36, ImageNet-512", "2.63", "1.70", 1, True, lambda: var("d36")),
    ]
    published = {1: ("7.77", "6.67"), 2: ("3.99", "2.88"), 4: ("2.51", "1.68"), 8: ("1.99", "1.46")}
    return [
        *found,
        *(
            Row(
                f"imm_imagenet256_t{t}",
                f"IMM, ImageNet-256, {t} step{'s' if t > 1 else ''}",
                *published[t],
                t,
                True,
                imm,
                4,
            )
            for t in (8, 4, 2, 1)
        ),
    ]


def images_sampled(config: Experiment) -> dict[str, int]:
    synth, select, report = (
        config.need("synth", Synth),
        config.need("select", Select),
        config.need("report", Report),
    )
    recipe = config.need("finetune", Training)
    snapshots = 1
    if select.snapshots == "all" and recipe.snapshot_images:
        snapshots = -(-recipe.images // recipe.snapshot_images)
    scales, w = len(select.cfg_scale or (None,)), len({0.0, -1.0, *select.w})
    points = scales * (snapshots * (w - 1) + 1) + 1  # the base once per scale; the random control
    return {"synth": synth.num_images, "select": points * select.num_images, "report": 4 * report.num_images}


def cost(row: Row) -> dict[str, object]:
    config = load(ROOT / "configs" / f"{row.config}.toml")
    recipe, sampling = config.need("finetune", Training), config.sampling
    assert sampling is not None
    forward = row.forward()
    images = images_sampled(config)
    per_image = forward * row.calls * (2 if row.is_guided else 1)
    seconds = {
        "sampling": sum(images.values()) * per_image / (H100_TFLOPS[sampling.precision] * 1e3 * SHARE),
        "finetune": recipe.images * row.passes * forward / (H100_TFLOPS[recipe.precision] * 1e3 * SHARE),
    }
    return {
        "config": row.config,
        "title": row.title,
        "published_base": row.base,
        "published_neon": row.neon,
        "command": f"scripts/reproduce/{row.config}.sh 8",
        "gflop_per_call": forward,
        "gflop_per_sampled_image": per_image,
        "images_sampled": images,
        "images_trained": recipe.images,
        "precision": {"sampling": sampling.precision, "finetune": recipe.precision},
        "h100_hours": {name: value / 3600 for name, value in seconds.items()},
        "assumed": {"share_of_peak": SHARE, "tflops": H100_TFLOPS},
        "status": "not yet reproduced here",
    }


def main() -> None:
    OUT.write_text(json.dumps([cost(row) for row in rows()], indent=1) + "\n")
    print(json.dumps({"out": str(OUT)}))


if __name__ == "__main__":
    main()
