"""Images that lie on disk as something to measure: one pass over them, and what a result says of where it came from."""

from __future__ import annotations

from pathlib import Path

import torch

import neon
from fid.features import Extractor
from neon.evaluation.collect import Collected, Wanted, collect
from neon.images.image_set import ImageSet
from neon.own_code import source_sha256
from neon.runtime.distributed import World
from neon.store import files, records

BLOCK = 256


def pass_over(
    images: ImageSet, chosen: range | None, wanted: Wanted, batch: int, resume: Path | None, ranks: World, desc: str
) -> Collected:
    """One pass over an image set (or the part `chosen`) by all ranks. Afterwards every rank's `images.remarks` holds
    what all of them saw; unreadable files are one error that names and counts them.

    resume: a folder for the sums so far; what they depend on is in the name of the folder inside.
    """
    chosen = range(len(images)) if chosen is None else chosen
    if not 0 <= chosen.start < chosen.stop <= len(images):
        raise ValueError(
            f"--images {chosen.start}:{chosen.stop}: {images.path} holds the images 0 to {len(images)} (the last "
            "excluded)"
        )
    if len(images) < 2:
        raise ValueError(f"{images.path}: a covariance needs at least 2 images, found {len(images)}")
    partial = None
    if resume is not None:
        network = wanted.extractor
        kept = [*sorted(wanted.metrics), *(["features"] if wanted.keep_features else [])]
        key = [identity(images, ranks), network.name, network.sha256, kept, [chosen.start, chosen.stop], batch]
        key += [source for source in [source_sha256(type(network))] if source is not None]
        partial = resume / f"partial-{records.key_of(key)[:16]}"
    found = collect(images.parts, [wanted], chosen, batch, ranks, num_images=len(images), partial=partial, desc=desc)
    for other in ranks.gather(images.remarks):
        images.remarks.update(other)
    return found


def identity(images: ImageSet, ranks: World) -> str:
    """Which set this is, by the content of all its images (which the ranks share), not by where it lies or what the
    archive is called: sums of another set must not be continued or added."""
    blocks = [range(start, min(start + BLOCK, len(images))) for start in range(0, len(images), BLOCK)]
    mine = {block.start: images.content_hash(block).hex() for block in blocks[ranks.rank :: ranks.size]}
    everywhere = {start: found for part in ranks.gather(mine) for start, found in part.items()}
    content = records.key_of([everywhere[block.start] for block in blocks])
    return f"{len(images)} images of {images.shape}, content {content[:16]}"


def describe_source(images: ImageSet) -> dict[str, object]:
    return {
        "source": images.path.name,
        "source_sha256": files.sha256_of(images.path) if images.path.is_file() else None,
        "image_shape": list(images.shape),
    }


def describe_extractor(network: Extractor) -> dict[str, object]:
    return {
        "extractor": network.name,
        "extractor_sha256": network.sha256,
        "resize": "tf1-bilinear-299" if network.comparable is None else "the extractor's own",
    }


def versions() -> dict[str, str]:
    return {"neon": neon.__version__, "torch": torch.__version__}
