"""Time the reverse merge: GB/s of the resident model moving to another w, beside the plain way, and of `neon merge` on
files.

\b
    python scripts/bench/merge.py --out results/bench/merge_cpu.json

Plain way: build theta_base - w (theta_syn - theta_base) as a dict of new tensors, then load_state_dict. Bytes: what
has to be moved at least, i.e. base and difference read, parameters written. About 20 seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import torch
from measuring import about, peak_mib, publish, reset_peak, seconds_of
from torch import nn

from neon.checkpoints import checkpoint
from neon.merge import LiveMerge, merged_entries


def network(megabytes: int, device: torch.device) -> nn.Module:
    """Square layers of a transformer's size."""
    width = 2048
    return nn.Sequential(
        *(nn.Linear(width, width, device=device) for _ in range(max(1, megabytes * 2**20 // (4 * width**2))))
    )


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True)
@click.option("--megabytes", default=512, show_default=True, help="Of the parameters, float32.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
@torch.no_grad()
def main(device: str, megabytes: int, repeats: int, out: Path | None) -> None:
    where = torch.device(device)
    result = about(where)
    model = network(megabytes, where)
    base = {name: value.detach().clone() for name, value in model.state_dict().items()}
    synth = {name: value + 1e-3 * torch.randn_like(value) for name, value in base.items()}
    size = sum(value.numel() * value.element_size() for value in base.values())
    live = LiveMerge(model, base, synth)
    live_s = seconds_of(lambda: live.set_w(1.5), where, repeats)
    moved = {name: value.clone() for name, value in model.state_dict().items()}
    plain_s = seconds_of(
        lambda: model.load_state_dict({k: base[k] - 1.5 * (synth[k] - base[k]) for k in base}), where, repeats
    )
    difference = max((moved[name] - value).abs().max().item() for name, value in model.state_dict().items())

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("base.safetensors", "synth.safetensors", "neon.safetensors")]
        for path, tensors in zip(files[:2], (base, synth), strict=True):
            checkpoint.write(path, {name: value.cpu() for name, value in tensors.items()}, metadata={})

        def merge_files() -> None:
            one, two = (checkpoint.read(path, weights="any").tensors for path in files[:2])
            checkpoint.write_streaming(files[2], one, merged_entries(one, two, 1.5), metadata={})

        reset_peak(where)
        file_s = seconds_of(merge_files, torch.device("cpu"))
    result |= {
        "parameter_bytes": size,
        "resident": {"seconds": live_s, "gb_per_s": 3 * size / live_s / 1e9},
        "plain": {"seconds": plain_s, "gb_per_s": 3 * size / plain_s / 1e9},
        "speedup": plain_s / live_s,
        "largest_difference_to_plain": difference,
        "files": {"seconds": file_s, "gb_per_s": 3 * size / file_s / 1e9, "peak_mib": peak_mib(torch.device("cpu"))},
    }
    publish(result, out)


if __name__ == "__main__":
    main()
