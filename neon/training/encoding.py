"""What training reads of stored images: the family's encoding of them, made once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from neon.family import Family
from neon.runtime.distributed import World
from neon.runtime.progress import progress
from neon.store import shards
from neon.store.records import claim_folder


def encoded(
    family: Family, images: shards.Corpus, folder: Path, identity: Mapping[str, object], world: World, batch: int
) -> shards.Corpus:
    """What training reads of stored images: the images themselves, or the family's encoding of them, made once in
    `folder`."""
    if type(family).encode is Family.encode:
        return images
    shard_images = 4096
    claim_folder(folder, {**identity, "num_images": len(images), "shard_images": shard_images}, world)
    ranges = shards.shard_ranges(len(images), shard_images)
    bar = progress(total=len(images), desc="encode", unit="img", world=world)
    for i, indices in list(enumerate(ranges))[world.rank :: world.size]:
        path = shards.shard_path(folder, i)
        if not shards.is_complete(path, indices):
            parts = [indices[start : start + batch] for start in range(0, len(indices), batch)]
            with torch.inference_mode():
                codes = torch.cat([family.encode(images.read(part).to(world.device)).cpu() for part in parts])
            labels = None if images.labels is None else images.labels[indices.start : indices.stop]
            shards.write_shard(path, codes, labels, indices)
        bar.update(len(indices) * world.size)
    bar.close()
    world.barrier()
    return shards.open_shards(folder, len(images), shard_images)
