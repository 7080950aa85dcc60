"""Peak memory of the search for w on a large model: loading the base, and moving it to several w.

\b
    python scripts/bench/search_memory.py --out results/bench/search_memory_imm_cpu.json

IMM's DiT-XL/2 with random weights; base and self-trained model lie in files in --folder (2.7 GB each).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import torch
from measuring import about, peak_mib, publish, reset_peak

from imm.presets import IMAGENET256
from neon.checkpoints import checkpoint
from neon.family import resolve
from neon.merge import LiveMerge, RandomDirection

POINTS = (0.0, 0.5, -1.0)


@click.command(help=__doc__)
@click.option("--model_type", default="DiT_XL_2", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where the two files are made.  [default: temporary]")
@click.option("--out", type=click.Path(path_type=Path))
def main(model_type: str, folder: Path | None, out: Path | None) -> None:
    device = torch.device("cpu")
    result = about(device) | {"model": model_type}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        base_path, synth_path = Path(temporary) / "base.safetensors", Path(temporary) / "synth.safetensors"
        family = resolve("imm")
        arch = {**IMAGENET256, "model_type": model_type}
        torch.manual_seed(0)
        model = family.build(arch)
        state = model.state_dict()
        result["weights_mib"] = sum(value.numel() * value.element_size() for value in state.values()) / 2**20
        metadata = {"family": "imm", "arch": arch, "weights": "ema"}
        checkpoint.write(base_path, state, metadata=metadata)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
        checkpoint.write(synth_path, model.state_dict(), metadata=metadata)
        del model, state
        reset_peak(device)
        before = peak_mib(device)
        model = family.load(checkpoint.read(base_path)).eval().requires_grad_(False)
        base = {name: value.detach().clone() for name, value in model.state_dict().items()}
        synth = checkpoint.read(synth_path).tensors
        names = [name for name, _ in model.named_parameters()]
        seconds = []
        for direction in (synth, RandomDirection(base, synth, names, seed=0)):
            live = LiveMerge(model, base, direction)
            for w in POINTS:
                started = time.perf_counter()
                live.set_w(w)
                seconds.append(round(time.perf_counter() - started, 2))
    result |= {"resident_before_mib": before, "peak_mib": peak_mib(device), "seconds_per_move": seconds}
    publish(result, out)


if __name__ == "__main__":
    main()
