"""`neon merge` where the self-trained model is a LoRA adapter: Neon's adapter, or the base with it folded in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from neon.checkpoints import checkpoint, folders, lora
from neon.checkpoints.checkpoint import Checkpoint
from neon.checkpoints.lazy import Entry
from neon.checkpoints.limits import first_of, shown
from neon.merge import merge_tensor
from neon.merge_files.outputs import FORMULA, new_folder, output_names
from neon.merge_files.pairing import Pair, Request, stored
from neon.store import files


def adapter_at(path: Path, weights: str | None, option: str) -> Checkpoint | None:
    """The checkpoint at `path` if it is a LoRA adapter (a file, or PEFT's folder), else None."""
    if path.is_dir():
        try:
            path = folders.only_entry(path)
        except FileNotFoundError:
            return None  # a pipeline of several networks
    opened = checkpoint.read(path, weights=weights or "auto", option=option)
    return opened if lora.is_adapter(opened.tensors) else None


def merge_adapter(base: Path, synth: Checkpoint, out: Path, request: Request) -> dict[str, object]:
    """Write the adapter that applies -w times the update of `synth`. If the base is an adapter too, both on one
    network, their updates are extrapolated; the ranks add up."""
    adapter = lora.read_adapter(synth)
    other = adapter_at(base, request.base_weights, "--base-weights")
    targets = output_names(out, request.w)
    is_folder = adapter.config is not None
    inputs = [*synth.files, *(other.files if other else [])]
    for target in targets:
        if is_folder and target.suffix == ".safetensors":
            raise ValueError(
                f"{target}: a PEFT adapter is a folder (its config says how it is applied); name a folder, or write "
                "the whole network with --lora full"
            )
        folders.check_new(target) if is_folder else checkpoint.check_target(target, inputs)
    for target, w in zip(targets, request.w, strict=True):
        if other is not None:
            made = lora.joined(lora.read_adapter(other), adapter, w)
        else:
            made = lora.scaled(adapter, -w)
            made.tensors.update(beside_the_factors(base, adapter, w, request))
        metadata: dict[str, object] = {"w": w, "kind": "lora", "synth_sha256": synth.sha256}
        if other is not None:
            metadata["base_sha256"] = other.sha256
        write_adapter(made, target, metadata)
        if request.check:
            check_adapter(made, target)
    done = [{"out": str(target), "w": w, "formula": FORMULA} for target, w in zip(targets, request.w, strict=True)]
    about: dict[str, object] = {"kind": "lora", "modules": len(adapter.factors)}
    return {**done[0], **about} if len(done) == 1 else {"merged": done, **about}


def beside_the_factors(base: Path, adapter: lora.Adapter, w: float, request: Request) -> dict[str, Tensor]:
    """Whole tensors that were trained beside the factors (modules_to_save, biases), extrapolated from the base's."""
    if not adapter.others:
        return {}
    found = checkpoint.read(base, weights=request.base_weights or "auto", option="--base-weights").tensors
    merged = {}
    for name, value in adapter.others.items():
        bare = name.removeprefix(lora.PEFT_PREFIX)
        if bare not in found:
            raise ValueError(f"{adapter.path}: {shown(name)} is no LoRA factor, and {base} has no {shown(bare)}")
        merged[name] = merge_tensor(bare, found[bare], value, w, request.on_mismatch)
    return merged


def write_adapter(made: lora.Adapter, target: Path, metadata: Mapping[str, object]) -> None:
    if made.config is None:
        checkpoint.write_streaming(target, made.tensors, made.tensors.items(), metadata=metadata, texts=made.texts)
        return
    with new_folder(target) as place:
        path = place / "adapter_model.safetensors"
        checkpoint.write_streaming(path, made.tensors, made.tensors.items(), metadata=metadata, texts=made.texts)
        files.write_text(place / lora.CONFIG, lora.config_text(made.config))


def check_adapter(made: lora.Adapter, target: Path) -> None:
    """Read what was written again. Raises ValueError if it is not what was meant."""
    found = checkpoint.read(target, weights="any").tensors
    wrong = [name for name, value in made.tensors.items() if name not in found or not torch.equal(found[name], value)]
    if wrong:
        raise ValueError(f"{target}: {first_of(wrong)} read differently from what was written: check the disk")


def adapted_pairs(base: Path, synth: Checkpoint, request: Request) -> list[Pair]:
    """Every network of the base, with the adapter's updates as the self-trained model. Raises ValueError if a module of
    the adapter is in none of them."""
    adapter = lora.read_adapter(synth)
    parts = [folders.Component("", base)]
    if base.is_dir():
        parts = folders.components(base, request.variant)
    is_transposed = bool(adapter.config and adapter.config.get("fan_in_fan_out"))
    left, pairs = set(adapter.factors) | set(adapter.others), []
    for part in parts:
        b = checkpoint.read(part.entry, weights=request.base_weights or "auto", option="--base-weights")
        entries = stored(b).entries
        partners: dict[str, Entry | None] = dict.fromkeys(entries)
        for module, name in lora.targets(adapter, entries, part.part).items():
            partners[name] = lora.Adapted(entries[name], adapter.factors[module], is_transposed)
            left.discard(module)
        tie_updates(partners, b)
        for name in adapter.others:
            bare = name.removeprefix(lora.PEFT_PREFIX)
            if bare in entries:
                partners[bare] = stored(synth).entries[name]
                left.discard(name)
        ties = {later: first for later, first in b.ties.items() if partners[later] is partners[first]}
        pairs.append(Pair(b, synth, part.part, partners, ties, sum(entry is not None for entry in partners.values())))
    if left:
        raise ValueError(
            f"{len(left)} modules of {synth.path} are in no network of {base}; first: {first_of(sorted(left))}. Is it "
            "an adapter of this model, in the same naming?"
        )
    return pairs


def tie_updates(partners: dict[str, Entry | None], base: Checkpoint) -> None:
    """Give a tied weight's update to all of its names, as folding it in does. Raises ValueError for two of them."""
    updated: dict[str, str] = {}
    for later, first in base.ties.items():
        for name in (first, later):
            other = updated.setdefault(first, name) if partners[name] is not None else name
            if other != name:
                raise ValueError(
                    f"{base.path}: {shown(other)} and {shown(name)} are one tensor and the adapter has two updates of "
                    "it, which no tied network can hold: adapt one of them, or merge into an untied copy"
                )
    for later, first in base.ties.items():
        if first in updated:
            partners[later] = partners[first] = partners[updated[first]]
