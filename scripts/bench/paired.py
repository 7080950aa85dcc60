"""Time what changed in this checkout against another one, turn by turn: before, after, before, after.

\b
    git worktree add --detach ../before COMMIT
    python scripts/bench/paired.py --before ../before --out results/bench/paired_cpu.json

Each side is a process of its own that has loaded its own checkout; a turn is one call in each. `times_before` is the
median of the turns' ratios (2: twice as fast), by wall clock and by CPU seconds, which other programs on the machine
disturb less. With torch-fidelity on the path, its KID and precision/recall take turns too. Minutes on a CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor, nn

Action = Callable[[], Tensor]
DIM = 2048
POINTS = 5000
KID_SUBSETS = 20


def inception() -> Action:
    """16 images of 32 x 32; weights drawn so that activations keep their size."""
    from fid.inception import InceptionExtractor, InceptionV3

    torch.manual_seed(0)
    network = InceptionV3()
    for parameter in network.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    extractor = InceptionExtractor(network, sha256="0" * 64)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    return lambda: extractor(images).pool


def var_vqvae(memory_format: torch.memory_format) -> nn.Module:
    """The VQ-VAE of VAR at its published size."""
    from var.vqvae import VQVAE, VQVAEArch

    torch.manual_seed(0)
    network = VQVAE(VQVAEArch(patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))).eval().requires_grad_(False)
    return network.to(memory_format=memory_format)


def var_decoder(memory_format: torch.memory_format = torch.contiguous_format) -> Action:
    """One image of 256 x 256."""
    network = var_vqvae(memory_format)
    latents = torch.randn(1, 32, 16, 16)
    return torch.inference_mode()(lambda: pixels(network.decode(latents)))


def var_decoder_channels_last() -> Action:
    """The same with sampling.channels_last, against itself without in the other checkout."""
    return var_decoder(torch.channels_last)


def var_decoder_compiled() -> Action:
    """The same with sampling.speed = "compiled"."""
    from neon.networks import autoencoder
    from neon.runtime.speed import accelerated

    network = var_vqvae(torch.channels_last)
    latents = torch.randn(1, 32, 16, 16)

    @torch.inference_mode()
    def decode() -> Tensor:
        with accelerated(network, None, autoencoder.COMPILED, "compiled"):
            return pixels(network.decode(latents))

    return decode


def kl_decoder(
    ch_mult: tuple[int, ...], z_channels: int, side: int, memory_format: torch.memory_format = torch.contiguous_format
) -> Action:
    from neon.networks.autoencoder import ConvArch, KLAutoencoder

    torch.manual_seed(0)
    arch = ConvArch(ch=128, ch_mult=ch_mult, num_res_blocks=2, z_channels=z_channels, has_moments=True)
    network = KLAutoencoder(arch).eval().requires_grad_(False).to(memory_format=memory_format)
    latents = torch.randn(1, z_channels, side, side)
    return torch.inference_mode()(lambda: pixels(network.decode(latents)))


def xar_decoder(memory_format: torch.memory_format = torch.contiguous_format) -> Action:
    """KL-16 at its published size, one image of 256 x 256."""
    return kl_decoder((1, 1, 2, 2, 4), 16, 16, memory_format)


def xar_decoder_channels_last() -> Action:
    return xar_decoder(torch.channels_last)


def imm_decoder(memory_format: torch.memory_format = torch.contiguous_format) -> Action:
    """The SD VAE at its published size, one image of 256 x 256."""
    return kl_decoder((1, 2, 4, 4), 4, 32, memory_format)


def imm_decoder_channels_last() -> Action:
    return imm_decoder(torch.channels_last)


def features(seed: int) -> Tensor:
    """Non-negative, correlated, with a spectrum that falls like a power: as pooled ReLU features are."""
    falling = torch.arange(1, DIM + 1)[:, None] ** -0.7
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)) * falling
    noise = torch.randn(POINTS, DIM, generator=torch.Generator().manual_seed(seed))
    return torch.relu(noise @ mixing / 4 + 0.2 + 0.02 * seed)


def kid() -> Action:
    from fid.metrics import kernel_distance

    one, two = features(1), features(2)
    return lambda: torch.tensor(kernel_distance(generated=one, reference=two, subsets=KID_SUBSETS), dtype=torch.float64)


def kid_of_torch_fidelity() -> Action:
    from torch_fidelity.metric_kid import kid_features_to_metric

    one, two = features(1), features(2)
    options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": 1000, "verbose": False}
    return lambda: torch.tensor(list(kid_features_to_metric(one, two, **options).values()), dtype=torch.float64)


def precision_recall() -> Action:
    if Path("fid/precision_recall.py").is_file():  # asked of the checkout: an installed copy would answer an import
        from fid.precision_recall import precision_recall as measure
    else:  # as it was called before
        from fid.neighbours import neighbours as measure

    one, two = features(1), features(2)
    return lambda: torch.tensor(measure(generated=one, reference=two, k=5)[:2], dtype=torch.float64)


def precision_recall_of_torch_fidelity() -> Action:
    from torch_fidelity.metric_prc import prc_features_to_metric

    one, two = features(1), features(2)
    values = lambda: prc_features_to_metric(one, two, prc_neighborhood=5, verbose=False)  # noqa: E731
    return lambda: torch.tensor([values()[name] for name in ("precision", "recall")], dtype=torch.float64)


def demo_sampling(speed: str = "exact") -> Action:
    """128 images of the demo's model in its own 8 steps."""
    from edm.family import EDM
    from edm.options import Sampling as Heun
    from neon.checkpoints import checkpoint
    from neon.sampling.generate import Source, generate, to_images
    from neon.sampling.options import Sampling

    family = EDM()
    network = family.load(checkpoint.read(Path("demo/base.safetensors")))
    sampling = Sampling(options=Heun(num_steps=8), batch=64, uint8="round", speed=speed)
    source = Source(family=family, sampling=sampling, labels="balanced", first_seed=0, num_classes=10)
    batches = [range(start, start + 64) for start in range(0, 128, 64)]

    def sample() -> Tensor:
        found = generate(source, network, batches, torch.device("cpu"))
        return torch.cat([to_images(source, batch.codes) for batch in found])

    return sample


def demo_sampling_compiled() -> Action:
    """The same with sampling.speed = "compiled", against "exact" in the other checkout."""
    return demo_sampling("compiled")


def pixels(images: Tensor) -> Tensor:
    return images.clamp(-1, 1).mul(127.5).add(127.5).round().to(torch.uint8)


CASES: dict[str, tuple[Callable[[], Action], Callable[[], Action]]] = {
    "inception": (inception, inception),
    "var_decoder": (var_decoder, var_decoder),
    "xar_decoder": (xar_decoder, xar_decoder),
    "imm_decoder": (imm_decoder, imm_decoder),
    "var_decoder, channels_last": (var_decoder, var_decoder_channels_last),
    "xar_decoder, channels_last": (xar_decoder, xar_decoder_channels_last),
    "imm_decoder, channels_last": (imm_decoder, imm_decoder_channels_last),
    "var_decoder, compiled": (var_decoder, var_decoder_compiled),
    "kid": (kid, kid),
    "precision_recall": (precision_recall, precision_recall),
    "demo_sampling": (demo_sampling, demo_sampling),
    "demo_sampling, compiled": (demo_sampling, demo_sampling_compiled),
    "kid, before = torch-fidelity": (kid_of_torch_fidelity, kid),
    "precision_recall, before = torch-fidelity": (precision_recall_of_torch_fidelity, precision_recall),
}
"""What runs in the other checkout, and what runs in this one."""


class Side:
    """A process that has loaded one checkout and runs a case once per turn."""

    def __init__(self, checkout: Path, case: str, is_after: bool, threads: int, result: Path):
        self.result = result
        command = [sys.executable, __file__, "--worker", case, "--threads", str(threads), "--out", str(result)]
        self._process = subprocess.Popen(
            [*command, *(["--is-after"] if is_after else [])],
            cwd=checkout,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},  # numpy's BLAS reads it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> Tensor:
        """What the last turn computed."""
        self._process.communicate()
        return torch.load(self.result)


def work(case: str, is_after: bool, threads: int, out: Path) -> None:
    sys.path.insert(0, str(Path.cwd()))  # the checkout; before it stands this script's own folder
    importlib.import_module("neon.cli")  # what a command does first: it chooses how torch fetches memory
    torch.set_num_threads(threads)
    action = CASES[case][is_after]()
    result = None
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        result = action()
        print(json.dumps({"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}), flush=True)
    torch.save(result, out)


def compare(case: str, before: Path, after: Path, turns: int, threads: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            Side(checkout, case, is_after, threads, Path(folder) / f"{is_after}.pt")
            for checkout, is_after in ((before, False), (after, True))
        ]
        first = [side.turn() for side in sides]
        rows = [[side.turn() for side in sides] for _ in range(turns)]
        one, two = (side.close() for side in sides)
    found: dict[str, object] = {
        f"{name}_{clock}": statistics.median(row[i][clock] for row in rows)
        for i, name in enumerate(("before", "after"))
        for clock in ("wall_s", "cpu_s")
    }
    for clock in ("wall_s", "cpu_s"):
        ratios = sorted(row[0][clock] / row[1][clock] for row in rows)
        found[f"times_before_by_{clock}"] = {
            "min": ratios[0],
            "median": statistics.median(ratios),
            "max": ratios[-1],
        }
    difference = (one.double() - two.double()).abs()
    return found | {
        "first_call_after_s": first[1]["wall_s"],
        "equal": torch.equal(one, two),
        "share_that_differs": (difference > 0).double().mean().item(),
        "largest_difference_over_largest_value": (difference.max() / one.double().abs().max()).item(),
    }


@click.command(help=__doc__)
@click.option("--before", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="[default: all]")
@click.option("--turns", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--worker", type=click.Choice(list(CASES)), hidden=True)
@click.option("--is-after", is_flag=True, hidden=True)
def main(
    before: Path | None,
    cases: tuple[str, ...],
    turns: int,
    threads: int,
    out: Path,
    worker: str | None,
    is_after: bool,
) -> None:
    if worker is not None:
        return work(worker, is_after, threads, out)
    if before is None:
        raise click.UsageError("name the checkout to compare with: --before FOLDER")
    from measuring import ROOT, about

    result = json.loads(out.read_text()) if out.is_file() else {}
    header = about(torch.device("cpu")) | {"threads": threads, "turns": turns}
    command = ["git", "-C", str(before), "rev-parse", "HEAD"]
    header["before"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    result.setdefault("cases", {})
    for case in cases or CASES:
        if "torch-fidelity" in case and importlib.util.find_spec("torch_fidelity") is None:
            continue
        result["cases"][case] = {"run": header, **compare(case, before.resolve(), ROOT, turns, threads)}
        out.write_text(json.dumps(result, indent=1) + "\n")
        click.echo(json.dumps({case: result["cases"][case]}))


if __name__ == "__main__":
    main()
