"""Time and memory of reading image sets: what an image of a zip costs, and what a large npz takes.

    python scripts/bench/reading.py --out results/bench/reading_cpu.json

Zips of 500, 5,000 and 50,000 images as `neon data` writes them, read in batches of 64 in order: the seconds per image
must not grow with the number of images. An npz of 2 GiB, stored and compressed, read once from front to back in a
process of its own: the memory that it takes beyond the interpreter, without the pages of the mapped file. Seconds of
the processor, because others may use the machine. Three to five minutes on 2 cores, 4 GiB of disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from measuring import about, publish
from torch import Tensor

from neon.images.formats import open_images, write_zip

SIDE = 32
SIZES = (500, 5_000, 50_000)
READ = 5_000
"""Images read of a large zip: enough to time one."""
NPZ_IMAGES = 10_923
"""Of 256 x 256 x 3 bytes: 2.0 GiB."""

READ_NPZ = """
import json, sys, time
import torch
from neon.images.formats import open_images
def own_mib():  # without the pages of the mapped file, which the system takes back when it needs them
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) / 1024
before, started, total, highest = own_mib(), time.process_time(), 0, 0.0
images = open_images(sys.argv[1])
for batch in images.batches(64):
    total += int(batch[:, :, ::64, ::64].sum())
    highest = max(highest, own_mib())
print(json.dumps({"images": len(images), "cpu_s": time.process_time() - started, "checksum": total,
    "memory_mib": highest - before}))
"""


def random_batches(count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, 500):
        shape = (min(500, count - start), 3, SIDE, SIDE)
        yield torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def bench_zip(folder: Path, count: int) -> dict[str, float]:
    path = folder / "set.zip"
    write_zip(path, random_batches(count), torch.arange(count) % 10)
    started = time.process_time()
    images = open_images(path)
    open_s = time.process_time() - started
    started, began = time.process_time(), time.perf_counter()
    for first in range(0, min(count, READ), 64):
        images.read(range(first, min(first + 64, count, READ)))
    cpu_s, wall_s = time.process_time() - started, time.perf_counter() - began
    size = path.stat().st_size
    path.unlink()
    read = min(count, READ)
    return {
        "images": count,
        "mib": size / 2**20,
        "open_cpu_s": open_s,
        "cpu_ms_per_image": 1000 * cpu_s / read,
        "cpu_ms_per_image_with_opening": 1000 * (open_s / count + cpu_s / read),
        "wall_ms_per_image": 1000 * wall_s / read,
    }


def bench_npz(folder: Path, *, is_compressed: bool) -> dict[str, float]:
    """Half random, so that compression neither fails nor is for nothing."""
    path = folder / "set.npz"
    generator = np.random.default_rng(0)
    images = np.zeros((NPZ_IMAGES, 256, 256, 3), np.uint8)
    images[:, ::4] = generator.integers(0, 256, (1, 64, 256, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(NPZ_IMAGES) % 256
    (np.savez_compressed if is_compressed else np.savez)(path, arr_0=images)
    size, mib = path.stat().st_size, images.nbytes / 2**20
    del images
    done = subprocess.run([sys.executable, "-c", READ_NPZ, str(path)], capture_output=True, text=True, check=True)
    path.unlink()
    return {"array_mib": mib, "file_mib": size / 2**20, **json.loads(done.stdout)}


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/bench/reading_cpu.json"))
def main(out: Path) -> None:
    """Write one JSON object."""
    result: dict[str, object] = {**about(torch.device("cpu")), "image": [3, SIDE, SIDE]}
    with tempfile.TemporaryDirectory() as folder:
        result["zip"] = [bench_zip(Path(folder), count) for count in SIZES]
        result["npz_stored"] = bench_npz(Path(folder), is_compressed=False)
        result["npz_compressed"] = bench_npz(Path(folder), is_compressed=True)
    publish(result, out)


if __name__ == "__main__":
    main()
