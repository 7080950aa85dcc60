"""The synthetic set S: |S| images by the model's ordinary sampler, in shards that any number of ranks makes and
resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

from neon.runtime.distributed import World
from neon.sampling.generate import Source, generate, to_images
from neon.sampling.options import Synth
from neon.store import shards
from neon.store.filling import Made, Plan, fill
from neon.store.records import claim_folder


def synthesize(
    source: Source, model: nn.Module, config: Synth, folder: Path, identity: Mapping[str, object], world: World
) -> shards.Shards:
    """Sample S into `folder` and open it; shards that are already there are kept.

    identity: everything S depends on; goes into manifest.json. Raises ValueError naming the key in which an existing
    manifest differs.
    """
    manifest: Mapping = {
        **identity,
        "num_images": config.num_images,
        "store": config.store,
        "shard_images": config.shard_images,
    }
    manifest = claim_folder(folder, manifest, world)

    def make(batches: Sequence[Sequence[int]]) -> Iterator[Made]:
        for batch in generate(source, model, batches, world.device):
            yield (
                batch.indices,
                to_images(source, batch.codes) if config.store == "images" else batch.codes,
                batch.labels,
            )

    plan = Plan(
        folder=folder,
        num_images=config.num_images,
        shard_images=manifest["shard_images"],
        batch=source.sampling.batch,
        damaged="refuse",
    )
    return fill(plan, make, world, "synth")
