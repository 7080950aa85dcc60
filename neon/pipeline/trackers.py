"""`--log tensorboard` and `--log wandb`: every line of a run's log and ledger, sent to a tracker as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from neon.store import records

Kind = Literal["tensorboard", "wandb"]
Send = Callable[[str, Mapping[str, float], int], None]
"""(group, values by name, step)"""


@contextmanager
def tracked(kind: Kind | None, folder: Path) -> Iterator[None]:
    """Run the block with a tracker that writes into `folder`/tensorboard or `folder`/wandb.

    Training goes under train/ by images seen; points of the search under points/ in the order of the ledger. Raises
    ImportError that says what to install.
    """
    if kind is None:
        yield
        return
    with (_tensorboard if kind == "tensorboard" else _wandb)(folder) as send:

        def listen(path: Path, line: Mapping[str, object]) -> None:
            number = len(records.read_lines(path)) if path.name == "ledger.jsonl" else 0
            for group, values, step in _values(path, line, number):
                send(group, values, step)

        records.LISTENERS.append(listen)
        try:
            yield
        finally:
            records.LISTENERS.remove(listen)


def _values(path: Path, line: Mapping[str, object], number: int) -> Iterator[tuple[str, Mapping[str, float], int]]:
    """What a line says in numbers."""
    metrics, point, images = line.get("metrics"), line.get("point"), line.get("images")
    if path.name == "log.jsonl" and isinstance(images, int):
        yield "train", {k: v for k in ("loss", "lr") if isinstance(v := line.get(k), float)}, images
    elif isinstance(metrics, Mapping) and isinstance(point, Mapping):
        settings = {k: v for k in ("w", "cfg_scale") if isinstance(v := point.get(k), float)}
        yield "points", {**settings, **{str(k): float(v) for k, v in metrics.items()}}, number


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Send]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--log tensorboard: pip install 'neon-generative[log]'") from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(group: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{group}/{name}", value, step)

    try:
        yield send
    finally:
        writer.close()


@contextmanager
def _wandb(folder: Path) -> Iterator[Send]:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("--log wandb: pip install 'neon-generative[log]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(project="neon", name=folder.name, dir=str(folder))
    run.define_metric("train/*", step_metric="train/images")
    run.define_metric("points/*", step_metric="points/number")

    def send(group: str, values: Mapping[str, float], step: int) -> None:
        own = "images" if group == "train" else "number"
        run.log({f"{group}/{own}": step, **{f"{group}/{name}": value for name, value in values.items()}})

    try:
        yield send
    finally:
        run.finish()
