"""The synthetic set S: |S| images by the model's ordinary sampler, in shards that any number of ranks makes and
resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from neon.runtime.distributed import World
from neon.runtime.progress import progress
from neon.sampling.generate import Source, generate, to_images
from neon.sampling.options import Synth
from neon.store import shards
from neon.store.records import claim_folder


def synthesize(
    source: Source, model: nn.Module, config: Synth, folder: Path, identity: Mapping[str, object], world: World
) -> shards.Shards:
    """Sample S into `folder` and open it; shards that are already there are kept.

    identity: everything S depends on; goes into manifest.json. Raises ValueError naming the key in which an existing
    manifest differs.
    """
    manifest = {**identity, "num_images": config.num_images, "store": config.store, "shard_images": config.shard_images}
    claim_folder(folder, manifest, world)
    ranges = shards.shard_ranges(config.num_images, config.shard_images)
    mine = [(i, indices) for i, indices in enumerate(ranges)][world.rank :: world.size]
    bar = progress(total=sum(len(indices) for _, indices in mine), desc="synth", unit="img", world=world)
    for i, indices in mine:
        path = shards.shard_path(folder, i)
        if not shards.is_complete(path, indices):
            _make_shard(source, model, config, path, indices, world)
        bar.update(len(indices))
    bar.close()
    world.barrier()
    return shards.open_shards(folder, config.num_images, config.shard_images)


def _make_shard(source: Source, model: nn.Module, config: Synth, path: Path, indices: range, world: World) -> None:
    size = source.sampling.batch
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    codes, labels = [], []
    for batch in generate(source, model, batches, world.device):
        codes.append((to_images(source, batch.codes) if config.store == "images" else batch.codes).cpu())
        if batch.labels is not None:
            labels.append(batch.labels.cpu())
    shards.write_shard(path, torch.cat(codes), torch.cat(labels) if labels else None, indices)
