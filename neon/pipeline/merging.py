"""`neon merge`: two checkpoint files in, the merged one out."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from neon.buffers import buffers_among
from neon.checkpoints import checkpoint
from neon.checkpoints.checkpoint import Checkpoint
from neon.family import resolve, shipped
from neon.merge import OnMismatch, merged_entries, step_size
from neon.store import files

log = logging.getLogger(__name__)


def merge(
    b: Checkpoint, s: Checkpoint, w: float, out: Path, parameters: Collection[str], on_mismatch: OnMismatch
) -> dict[str, object]:
    """Write base - w (synth - base) and return what was done, as JSON-like data."""
    checkpoint.check_target(out, [*b.files, *s.files])
    entries = merged_entries(b.tensors, s.tensors, w, parameters=parameters, on_mismatch=on_mismatch)
    metadata = {**checkpoint.about(b), "w": w, "base_sha256": b.sha256, "synth_sha256": s.sha256}
    is_tied_alike = b.ties.items() <= s.ties.items()
    specs = b.tensors if is_tied_alike else b.specs  # where the other model broke a tie, the values differ
    checkpoint.write_streaming(out, specs, entries, metadata=metadata, texts=b.texts)
    step = step_size(b.tensors, s.tensors, w, parameters)
    if step["swallowed"] > 0.01:
        log.warning(
            "%.0f %% of the moved entries did not change: their dtype is too coarse for this step",
            100 * step["swallowed"],
        )
    formula = "theta_base - w (theta_syn - theta_base)"
    return {"out": str(out), "w": w, "formula": formula, "sha256": files.sha256_of(out), **step}


def read_pair(
    base: Path, synth: Path, base_weights: str | None, synth_weights: str | None
) -> tuple[Checkpoint, Checkpoint]:
    """The weight sets of both files. Raises ValueError if nobody named them and one is an average, the other is not."""
    b = checkpoint.read(base, weights=base_weights or "auto", option="--base-weights")
    s = checkpoint.read(synth, weights=synth_weights or "auto", option="--synth-weights")
    if not (base_weights and synth_weights) and {b.weights, s.weights} == {"ema", "raw"}:
        raise ValueError(
            f"{base} gives its {b.weights!r} weights and {synth} its {s.weights!r} weights, which do not belong "
            "together; name the sets with --base-weights and --synth-weights if you mean it"
        )
    return b, s


def parameter_names(found: Checkpoint, family: str | None) -> set[str]:
    """Names of the network's parameters. A file does not decide what is imported: `family`, or a shipped one that it
    names, builds the network it describes; where that cannot be done, its own names tell (`neon.buffers`)."""
    name = family or (found.family if found.family in shipped() else None)
    if name is not None and found.arch is not None:
        try:
            return built_parameters(name, found.arch, limit=1000 + 20 * len(found.tensors))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            if family:
                raise ValueError(
                    f"{found.path}: the network of {family!r} cannot be built from its arch ({error})"
                ) from error
            log.warning("the network cannot be built here (%s); buffers are told by name", error)
    return set(found.tensors) - buffers_among(found.tensors)


def built_parameters(family: str, arch: Mapping[str, object], limit: int) -> set[str]:
    """Parameter names of a network that is built without memory; refused once it has more than `limit` modules."""
    built = 0

    def count(*_: object) -> None:
        nonlocal built
        built += 1
        if built > limit:
            raise ValueError(f"its arch describes more than {limit} modules, the file has far fewer tensors")

    hook = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            return {name for name, _ in resolve(family).build(arch).named_parameters()}
    finally:
        hook.remove()
