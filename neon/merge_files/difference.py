"""`neon diff`: where self-training moved the weights, block by block, and whether its snapshots go the same way."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from neon.checkpoints.lazy import Entry, StoredTensor
from neon.checkpoints.one_pass import CHUNK, Reader, one_torch_thread
from neon.merge import difference, is_discrete, is_finite
from neon.merge_files.adapting import adapted_pairs, adapter_at
from neon.merge_files.pairing import Pair, Request, pairs_of, stored
from neon.store import files


@dataclass
class Block:
    """Sums over the parameters of one block. gram[i, j] = <step_i, step_j> of the snapshots, in float64."""

    name: str
    num_parameters: int
    base_squares: float
    gram: torch.Tensor

    def relative_steps(self) -> list[float]:
        """|theta_syn - theta_base| / |theta_base| of every snapshot; infinite where the base is zero."""
        size = math.sqrt(self.base_squares)
        return [math.sqrt(square) / size if size else math.inf for square in self.gram.diagonal().tolist()]

    def cosines(self) -> list[float]:
        """Cosine between every snapshot's step and the last one's; NaN where one of them is zero."""
        norms = self.gram.diagonal().sqrt()
        return (self.gram[-1] / (norms * norms[-1])).tolist()

    def about(self) -> dict[str, object]:
        def finite(values: list[float]) -> list[float | None]:
            return [value if math.isfinite(value) else None for value in values]

        return {
            "block": self.name,
            "parameters": self.num_parameters,
            "relative_step": finite(self.relative_steps()),
            "cosine_to_last": finite(self.cosines()),
        }


def diff(base: Path, snapshots: Sequence[Path], request: Request) -> list[Block]:
    """One `Block` per part of the network, in the order of the file, and "all" at the end. Memory is that of a few
    pieces. Raises ValueError if the models do not fit, or a parameter is not finite."""
    by_snapshot = [pairs_with(base, path, request) for path in snapshots]
    blocks: dict[str, Block] = {}
    readers = [Reader(has_hashes=False) for _ in range(len(snapshots) + 1)]
    try:
        for pairs in zip(*by_snapshot, strict=True):
            for name, entries in moving(pairs):
                key = "/".join(filter(None, (pairs[0].part, block_of(name))))
                block = blocks.setdefault(key, Block(key, 0, 0.0, torch.zeros(len(snapshots), len(snapshots)).double()))
                with one_torch_thread():
                    add_tensor(block, name, entries, readers)
    finally:
        for reader in readers:
            reader.close()
    found = list(blocks.values())
    total = Block("all", 0, 0.0, torch.zeros(len(snapshots), len(snapshots)).double())
    for block in found:
        total.num_parameters += block.num_parameters
        total.base_squares += block.base_squares
        total.gram += block.gram
    return [*found, total]


def pairs_with(base: Path, snapshot: Path, request: Request) -> list[Pair]:
    adapter = adapter_at(snapshot, request.synth_weights, "--synth-weights")
    if adapter is not None:
        return adapted_pairs(base, adapter, request)
    return pairs_of(base, snapshot, request, is_folder=base.is_dir() and snapshot.is_dir())


def moving(pairs: Sequence[Pair]) -> Iterator[tuple[str, list[Entry]]]:
    """(name, [base, snapshot, ...]) of every parameter that all snapshots have; tied ones once."""
    for name, entry in stored(pairs[0].base).entries.items():
        others = [pair.partners[name] for pair in pairs]
        if name not in pairs[0].base.ties and all(others) and not is_discrete(entry.meta):
            yield name, [entry, *(other for other in others if other is not None)]


def add_tensor(block: Block, name: str, entries: Sequence[Entry], readers: Sequence[Reader]) -> None:
    first = entries[0]
    assert isinstance(first, StoredTensor)
    total = math.prod(first.shape)
    memory = [torch.empty(CHUNK * 16, dtype=torch.uint8) for _ in entries]
    for start in range(0, total, CHUNK):
        count = min(CHUNK, total - start)
        base, *others = (
            reader.read(entry, start, count, buffer, "base")
            for entry, reader, buffer in zip(entries, readers, memory, strict=True)
        )
        if not all(is_finite(values) for values in (base, *others)):
            raise ValueError(f"{name}: not every entry is finite; there is no step to measure")
        steps = torch.stack([difference(base, other).double() for other in others])
        block.gram += steps @ steps.T
        block.base_squares += base.double().square().sum().item()
        block.num_parameters += count


def block_of(name: str) -> str:
    """blocks.3 of blocks.3.attn.weight: up to the first number; without one, the first three parts of the module."""
    numbered = re.match(r"(.*?\.\d+)\.", name)
    return numbered[1] if numbered else ".".join(name.split(".")[:-1][:3]) or name


def table(blocks: Sequence[Block], snapshots: Sequence[str]) -> str:
    """The blocks as text: relative step of every snapshot in percent, and the cosine of the first to the last."""
    width = max(len(block.name) for block in blocks)
    head = f"{'block':{width}}  {'parameters':>12}  " + "  ".join(f"{name[-14:]:>14}" for name in snapshots)
    lines = [head + ("  cosine first to last" if len(snapshots) > 1 else "")]
    for block in blocks:
        steps = "  ".join(f"{100 * step:12.4f} %" for step in block.relative_steps())
        cosine = f"  {block.cosines()[0]:20.4f}" if len(snapshots) > 1 else ""
        lines.append(f"{block.name:{width}}  {block.num_parameters:12,d}  {steps}{cosine}")
    return "\n".join(lines)


def draw(blocks: Sequence[Block], snapshots: Sequence[str], out: Path) -> None:
    """A picture of the table: relative step per block, a panel of cosines beside it where there are snapshots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = blocks[:-1]
    many = len(snapshots) > 1
    figure = Figure(figsize=(12 if many else 8, max(2.5, 0.22 * len(shown) + 1.2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if many else 1, sharey=True, squeeze=False)[0]
    rows = range(len(shown))
    for number, name in enumerate(snapshots):
        axes[0].plot([100 * block.relative_steps()[number] for block in shown], rows, "o-", markersize=3, label=name)
    axes[0].set_yticks(list(rows), [block.name for block in shown], fontsize=7)
    axes[0].invert_yaxis()
    axes[0].set_xscale("log")
    axes[0].set_xlabel("|theta_syn - theta_base| / |theta_base|, %")
    if many:
        for number, name in enumerate(snapshots[:-1]):
            axes[1].plot([block.cosines()[number] for block in shown], rows, "o-", markersize=3, label=name)
        axes[1].set_xlabel(f"cosine to the step of {snapshots[-1]}")
        axes[1].set_xlim(-1.05, 1.05)
    for axis in axes:
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend(fontsize=7)
    with files.replacing(out) as file:
        figure.savefig(file, format="png", dpi=120)


def about(blocks: Sequence[Block], snapshots: Sequence[Path]) -> Mapping[str, object]:
    return {"snapshots": [str(path) for path in snapshots], "blocks": [block.about() for block in blocks]}
