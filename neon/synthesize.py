"""The synthetic set S: |S| images by the model's ordinary sampler, in shards that any number of ranks makes and resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from neon import records, shards
from neon.config import Synth
from neon.distributed import World
from neon.family import Family
from neon.generate import Source, generate, to_images
from neon.progress import progress


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


def encoded(family: Family, images: shards.Corpus, folder: Path, identity: Mapping[str, object], world: World, batch: int) -> shards.Corpus:
    """What training reads of stored images: the images themselves, or the family's encoding of them, made once in `folder`."""
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


def claim_folder(folder: Path, manifest: Mapping[str, object], world: World) -> None:
    """Write the folder's manifest, or check that the one that is there says the same."""
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "manifest.json"
        if path.is_file():
            records.check_same(records.read_json(path), manifest, folder)
        else:
            records.write_json(manifest, path)
    world.barrier()
