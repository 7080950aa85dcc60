"""What training reads of stored images: the family's encoding of them, made once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from neon import first_batch
from neon.family import Family
from neon.runtime.distributed import World
from neon.store import shards
from neon.store.filling import Made, Plan, fill
from neon.store.records import claim_folder

SHARD_IMAGES = 4096


def encoded(
    family: Family, images: shards.Corpus, folder: Path, identity: Mapping[str, object], world: World, batch: int
) -> shards.Corpus:
    """What training reads of stored images: the images themselves, or the family's encoding of them, made once in
    `folder`."""
    if type(family).encode is Family.encode:
        return images
    manifest = claim_folder(folder, {**identity, "num_images": len(images), "shard_images": SHARD_IMAGES}, world)

    def make(batches: Sequence[Sequence[int]]) -> Iterator[Made]:
        for part in batches:
            with torch.inference_mode():
                codes = family.encode(images.read(part).to(world.device))
            first_batch.encoded(type(family).__name__, codes, len(part))
            yield part, codes, None if images.labels is None else images.labels[torch.as_tensor(part)]

    plan = Plan(
        folder=folder, num_images=len(images), shard_images=manifest["shard_images"], batch=batch, damaged="remake"
    )
    return fill(plan, make, world, "encode")
