"""`neon merge`: two checkpoints of one network (or two folders of several) in, the merged ones out, in one pass."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from neon.checkpoints import checkpoint, folders
from neon.checkpoints.checkpoint import Checkpoint
from neon.checkpoints.lazy import StoredTensor
from neon.checkpoints.one_pass import Item, Moved, Output, Reader, merge_into
from neon.checkpoints.safetensors_format import check_metadata, encode_header, lay_out, read_back
from neon.merge_files.adapting import adapted_pairs, adapter_at, merge_adapter
from neon.merge_files.outputs import FORMULA, new_file, new_folder, output_names
from neon.merge_files.pairing import Pair, Request, pairs_of, stored
from neon.store import files

log = logging.getLogger(__name__)
NO_HASH = "0" * 64
"""Stands in a header for the hash of an input until all of it was read."""


@dataclass
class Written:
    """One file of the output: its name, its tensors, and its header's texts for a w and both inputs' hashes."""

    name: str
    items: list[Item]
    specs: dict[str, torch.Tensor]
    offsets: dict[str, int]
    texts: Texts


def merge(base: Path, synth: Path, out: Path, request: Request) -> dict[str, object]:
    """Write base - w (synth - base) for every w and return what was done, as JSON-like data.

    base, synth: checkpoints of any layout, or folders; out: a .safetensors file, or a folder that is not there yet,
    which gets the base's sharding and side files. Nothing is in place before everything was written and read back.
    Raises ValueError or OSError.
    """
    adapter = adapter_at(synth, request.synth_weights, "--synth-weights")
    if adapter is not None and request.lora == "adapter":
        return merge_adapter(base, adapter, out, request)
    is_folder = not folders.ANY_WEIGHTS.fullmatch(out.name)
    if is_folder and not base.is_dir() and base.suffix != ".json":
        raise ValueError(f"{out}: {base} is one file, so is what is written; expected a name ending in .safetensors")
    pairs = (
        pairs_of(base, synth, request, is_folder=is_folder)
        if adapter is None
        else adapted_pairs(base, adapter, request)
    )
    targets = output_names(out, request.w)
    inputs = [path for pair in pairs for path in (*pair.base.files, *pair.synth.files)]
    for target in targets:
        folders.check_new(target) if is_folder else checkpoint.check_target(target, inputs)
    stats = [Moved() for _ in request.w]
    reader = Reader(has_hashes=request.has_hashes)
    with ExitStack() as stack:
        stack.callback(reader.close)
        places = [stack.enter_context(new_folder(target) if is_folder else new_file(target)) for target in targets]
        sums = [write_pair(pair, places, request, stats, reader, is_folder=is_folder) for pair in pairs]
        if base.is_dir() and is_folder:
            for place in places:
                copy_side_files(base, place)
    for problem in complaints(stats, request):
        log.warning("%s", problem)
    done = [
        {"out": str(target), "w": w, "formula": FORMULA, **hashes_of(sums, number), **stats[number].about()}
        for number, (target, w) in enumerate(zip(targets, request.w, strict=True))
    ]
    counts = {"parameters": sum(pair.parameters for pair in pairs), "tensors": sum(len(p.partners) for p in pairs)}
    return {**done[0], **counts} if len(done) == 1 else {"formula": FORMULA, "merged": done, **counts}


def hashes_of(sums: Sequence[Sequence[dict[str, str]]], number: int) -> dict[str, object]:
    """{"sha256": of the one file} or {"files": {name: hash}}; nothing if no hashes were wanted."""
    merged = {name: digest for pair in sums for name, digest in pair[number].items() if digest}
    if not merged:
        return {}
    return {"sha256": next(iter(merged.values()))} if list(merged) == [""] else {"files": merged}


def complaints(stats: Sequence[Moved], request: Request) -> Iterator[str]:
    if stats[0].about()["relative_step"] == 0:
        yield "BASE and SYNTH hold the same numbers: the result is BASE, whatever w is"
    for w, moved in zip(request.w, stats, strict=True):
        swallowed = moved.about()["swallowed"]
        if swallowed > 0.01:
            share = f"w = {w:g}: {100 * swallowed:.0f} % of the moved entries did not change"
            yield f"{share}: their dtype is too coarse for this step"
        if moved.overflowed:
            yield f"w = {w:g}: {moved.overflowed} entries left the range of their dtype and are infinite or NaN"


def doubts(pair: Pair, base_sha256: str, synth_sha256: str) -> Iterator[str]:
    """What the files say of their origin against the order in which they were named; without hashes, only whether SYNTH
    is a merge."""
    merged_at = pair.synth.meta.get("w")
    if isinstance(merged_at, int | float) and merged_at != -1:
        yield (
            f"{pair.synth.path} is itself the result of a merge (w = {merged_at:g}), no self-trained model: is another "
            "file meant, the run's finetune/snapshot-*.safetensors?"
        )
    origin_of_base, origin_of_synth = (found.meta.get("base_sha256") for found in (pair.base, pair.synth))
    if not base_sha256:
        return
    if origin_of_base == synth_sha256:
        yield (
            f"{pair.base.path} says that it was made from {pair.synth.path}: are they swapped? "
            "The base comes first: neon merge BASE SYNTH"
        )
    elif origin_of_synth not in (None, base_sha256):
        yield f"{pair.synth.path} says that it was made from another base than {pair.base.path} (base_sha256)"


def write_pair(
    pair: Pair, places: Sequence[Path], request: Request, stats: Sequence[Moved], reader: Reader, *, is_folder: bool
) -> list[dict[str, str]]:
    """Write one network into every place. Returns {file name: SHA-256} for each ("" names a lone file)."""
    plans = plans_of(pair, is_folder=is_folder)
    names = [f"{pair.part}/{plan.name}".strip("/") if is_folder else "" for plan in plans]
    sums: list[dict[str, Future[str]]] = [{} for _ in places]
    inputs = ["", ""]
    with ThreadPoolExecutor(1) as finishing:
        for name, plan in zip(names, plans, strict=True):
            with ExitStack() as stack:
                outputs = []
                for place, w in zip(places, request.w, strict=True):
                    path = place / name if is_folder else place
                    path.parent.mkdir(exist_ok=True)
                    header = encode_header(plan.specs, plan.offsets, plan.texts(w, NO_HASH, NO_HASH))
                    outputs.append(Output(stack.enter_context(open(path, "wb")), w, len(header)))
                merge_into(plan.items, outputs, stats, reader, request.on_mismatch)
                if request.has_hashes and plan is plans[-1]:
                    inputs = [found.hash_by(reader.sha256) for found in (pair.base, pair.synth)]
                stack.pop_all()  # `finish` closes them, while the next file is merged
            for output, digests in zip(outputs, sums, strict=True):
                digests[name] = finishing.submit(finish, output, plan, inputs, has_hash=request.has_hashes)
    for problem in doubts(pair, *inputs):
        log.warning("%s", problem)
    found = [{name: digest.result() for name, digest in digests.items()} for digests in sums]
    for place, w, done in zip(places, request.w, found, strict=True):
        if is_folder and pair.base.shards:
            write_index(place / pair.part, pair, plans, about_merge(pair, w, *inputs))
        if request.check:
            check_output({place / name if is_folder else place: digest for name, digest in done.items()})
    return found


def finish(output: Output, plan: Written, inputs: Sequence[str], *, has_hash: bool) -> str:
    """The header with the inputs' hashes, everything on the disk, read back. Returns the file's SHA-256, or ""."""
    path = Path(output.file.name)
    with output.file as file:
        file.seek(0)
        file.write(encode_header(plan.specs, plan.offsets, plan.texts(output.w, *inputs), at_least=output.start))
        file.flush()
        os.fsync(file.fileno())
    read_back(path, plan.specs)
    return files.sha256_of(path) if has_hash else ""


def check_output(sums: Mapping[Path, str]) -> None:
    """Read what was written again, from the disk where the system lets go of its copy."""
    for path, digest in sums.items():
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if digest != files.sha256_of(path):
            raise ValueError(f"{path} reads differently from what was written: check the disk")


def plans_of(pair: Pair, *, is_folder: bool) -> list[Written]:
    """The files of one network: one, or one for every shard of the base."""
    base = stored(pair.base).entries
    kept = [name for name in base if name not in pair.ties]
    shard_of = dict.fromkeys(kept, "")
    if is_folder:
        shard_of = {name: folders.safetensors_name(source_name(base[name], pair.base)) for name in kept}
    plans = []
    for shard in sorted(set(shard_of.values())):
        here = [name for name in kept if shard_of[name] == shard]
        specs = {name: base[name].meta for name in here}
        by_place = sorted(here, key=lambda name: (base[name].storage.offset, base[name].offset))
        offsets = lay_out({name: specs[name] for name in by_place})
        items = [
            Item(name, base[name], pair.partners[name], offsets[name])
            for name in sorted(here, key=lambda n: offsets[n])
        ]
        aliases = {later: first for later, first in pair.ties.items() if shard_of[first] == shard}
        texts = texts_of(pair, aliases, has_shards=len(set(shard_of.values())) > 1)
        plans.append(Written(shard, items, specs, offsets, texts))
        check_metadata(Path(shard or "the output"), specs, plans[-1].texts(0.0, NO_HASH, NO_HASH))
    return plans


def source_name(entry: StoredTensor, found: Checkpoint) -> str:
    source = entry.storage.source
    return found.path.name if isinstance(source, bytes) else source.path.name


Texts = Callable[[float, str, str], dict[str, str]]
"""(w, hash of the base, hash of the other model) -> the texts in a header."""


def texts_of(pair: Pair, aliases: Mapping[str, str], *, has_shards: bool) -> Texts:
    """The header's texts for a w and both inputs' hashes. Shards carry the base's own; their index has the rest."""

    def texts(w: float, base: str, synth: str) -> dict[str, str]:
        if has_shards:
            return {"format": "pt", **pair.base.texts, **aliases}
        return {**checkpoint.file_metadata(about_merge(pair, w, base, synth), pair.base.texts), **aliases}

    return texts


def about_merge(pair: Pair, w: float, base_sha256: str, synth_sha256: str) -> dict[str, object]:
    hashes = {"base_sha256": base_sha256, "synth_sha256": synth_sha256} if base_sha256 else {}
    return {**checkpoint.about(pair.base), "w": w, **hashes}


def write_index(folder: Path, pair: Pair, plans: Sequence[Written], about: Mapping[str, object]) -> None:
    """The index of the shards, with our metadata beside the base's."""
    total = sum(spec.numel() * spec.itemsize for plan in plans for spec in plan.specs.values())
    shards = {name: plan.name for plan in plans for name in plan.specs}
    weight_map = {name: shards[pair.ties.get(name, name)] for name in stored(pair.base).entries}
    metadata = {"total_size": total, "neon": {**about, "format": 1}}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
    files.write_text(folder / folders.safetensors_name(pair.base.path.name), text)


def copy_side_files(base: Path, place: Path) -> None:
    """Configs, tokenizers and schedulers of the base; links of the Hub's cache become files."""
    for relative in folders.side_files(base):
        (place / relative.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / relative, place / relative)
