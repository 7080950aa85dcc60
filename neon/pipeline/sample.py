"""`neon sample`: images of a checkpoint as PNG files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from neon import quantize
from neon.checkpoints import checkpoint
from neon.config_table import build, to_plain
from neon.family import Family, num_classes_of, resolve
from neon.images.formats import write_folder, write_zip
from neon.own_code import shipped
from neon.pipeline.base_model import load_network
from neon.runtime.distributed import World
from neon.runtime.progress import progress
from neon.sampling.generate import Source, generate, to_images
from neon.sampling.options import Sampling


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to sample from which file, and where to."""

    checkpoint: Path
    weights: str
    family: str | None
    autoencoder: Path | None
    num_images: int
    first_seed: int
    batch: int
    options: Mapping[str, object]
    """Values of the family's sampling options, before those that the file was made for."""
    uint8: quantize.Rule | None
    """None: the rule that the file names, else "round"."""
    out: Path
    """A .zip, or the folder of the PNG files; must not exist yet."""


def sample(request: Request, world: World) -> dict[str, object]:
    """Sample and write. Image i has seed first_seed + i and, if the network takes labels, class i mod their number.

    Raises ValueError if the family is not known, needs an option that is not given, or `out` is there already.
    """
    if request.out.exists():
        raise FileExistsError(f"{request.out} is there already: name another place with --out")
    if world.size > 1:
        raise ValueError("neon sample runs in one process; `neon synth CONFIG` shares its images among ranks")
    found = checkpoint.read(request.checkpoint, weights=request.weights, option="--weights ...")
    family = _family(found, request.family)
    own = _own_options(found, family)
    options = _options(family, {**own, **request.options})
    family.open(request.autoencoder, world.device)
    model = load_network(found, family).to(world.device).eval().requires_grad_(False)
    classes = num_classes_of(family, model)
    stored = found.meta.get("uint8")
    rule = request.uint8 or (stored if stored in quantize.RULES else "round")
    sampling = Sampling(uint8=rule, batch=request.batch, options=options)
    source = Source(
        family=family, sampling=sampling, labels="balanced", first_seed=request.first_seed, num_classes=classes
    )

    def images() -> Iterator[Tensor]:
        batches = world.batches(request.num_images, request.batch)
        with closing(progress(total=request.num_images, desc="sample", unit="img", world=world)) as bar:
            for batch in generate(source, model, batches, world.device):
                yield to_images(source, batch.codes).cpu()
                bar.update(len(batch.indices))

    if request.out.suffix == ".zip":
        labels = torch.arange(request.num_images) % classes if classes else None
        count = write_zip(request.out, images(), labels)
    else:
        count = write_folder(request.out, images())
    return {
        "out": str(request.out),
        "num_images": count,
        "family": family.name,
        "weights": found.weights,
        "uint8": rule,
        "sampling": to_plain(options),
        "from_file": sorted(own.keys() - request.options.keys()),
    }


def _family(found: checkpoint.Checkpoint, name: str | None) -> Family:
    """The named one, or a shipped one that the file names or looks like; a file decides nothing else."""
    path = Path(found.path)
    if "diffusers" in (name, found.family) or (path / "model_index.json").is_file():
        folder = path if path.is_dir() else path.parent / "pipeline"  # where `neon run` leaves the whole pipeline
        raise ValueError(
            f"{path}: a pipeline is sampled with diffusers itself: DiffusionPipeline.from_pretrained('{folder}'), "
            "with the scheduler and the steps of the run's [sampling]"
        )
    if name is not None:
        return resolve(name)
    if found.family in shipped():
        return resolve(str(found.family))
    says = "does not say of which family it is" if found.family is None else f"is of the family {found.family!r}"
    raise ValueError(f"{found.path} {says}: name it with --family ({', '.join(shipped())} or module:Class)")


def _own_options(found: checkpoint.Checkpoint, family: Family) -> dict[str, object]:
    """The sampling options that `neon run` chose w for, as its merged file says."""
    said = found.meta.get("sampling")
    known = {field.name for field in fields(family.sampling)}
    if not isinstance(said, Mapping):
        return {}
    # JSON has no infinity: `to_plain` wrote EDM's S_max as a word
    return {key: math.inf if value == "inf" else value for key, value in said.items() if key in known}


def _options(family: Family, given: Mapping[str, object]) -> object:
    """Raises ValueError for an unknown option, and for guidance that is not named: it has no hidden default."""
    if family.is_guided and "cfg_scale" not in given:
        raise ValueError(f"the family {family.name} is guided, name the scale: --set cfg_scale=...")
    known = ", ".join(field.name for field in fields(family.sampling))
    try:
        return build(family.sampling, given, "sampling")
    except ValueError as error:
        raise ValueError(f"--set: {error} (options of {family.name}: {known or 'none'})") from error
