"""Neon's merge (arXiv 2510.03597, Algorithm 1): theta_neon = theta_base - w (theta_syn - theta_base).

w > 0 moves away from the self-trained model; w = 0 is the base and w = -1 the self-trained model, bit for bit. Nothing
is normalised. The difference form keeps a short fine-tune's small step exact; (1 + w) base - w syn would round it
twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from neon.seeds import derived_seed

OnMismatch = Literal["error", "keep_base"]


def reverse_merge(
    base: Mapping[str, Tensor],
    synth: Mapping[str, Tensor],
    w: float,
    *,
    parameters: Collection[str] | None = None,
    on_mismatch: OnMismatch = "error",
) -> dict[str, Tensor]:
    """base - w (synth - base) for every parameter; everything else is the base's.

    base, synth: state dicts with equal keys and shapes; any float dtype, mixed allowed. The arithmetic is at least
        float32 and is rounded once, to the base's dtype.
    w: any finite number, same units as the paper's.
    parameters: names that are extrapolated, all others are buffers and come from the base; None means every name.
    on_mismatch: "error" refuses missing or extra names and entries that differ without being finite floats in both;
        "keep_base" keeps the base's entries there, which is what the published scripts did.
    Raises ValueError naming the first offending entries.
    """
    return dict(merged_entries(base, synth, w, parameters=parameters, on_mismatch=on_mismatch))


def merged_entries(
    base: Mapping[str, Tensor],
    synth: Mapping[str, Tensor],
    w: float,
    *,
    parameters: Collection[str] | None = None,
    on_mismatch: OnMismatch = "error",
) -> Iterator[tuple[str, Tensor]]:
    """`reverse_merge` one entry at a time, in the base's order: with lazy mappings only one tensor is in memory."""
    if not math.isfinite(w):
        raise ValueError(f"w must be a finite number, got {w}")
    check_same_names(base, synth, on_mismatch)
    for name in base:
        if name in synth and (parameters is None or name in parameters):
            yield name, _merge_tensor(name, base[name], synth[name], w, on_mismatch)
        else:
            yield name, base[name]


def _merge_tensor(name: str, base: Tensor, synth: Tensor, w: float, on_mismatch: OnMismatch) -> Tensor:
    if base.shape != synth.shape:
        raise ValueError(
            f"{name}: the base has shape {tuple(base.shape)}, the self-trained model {tuple(synth.shape)}; not the "
            "same network"
        )
    if w == 0 or (
        base.dtype == synth.dtype and torch.equal(base, synth)
    ):  # -inf masks, counters, frozen tensors: nothing to extrapolate
        return base
    extrapolable = base.is_floating_point() and synth.is_floating_point()
    if extrapolable and is_finite(base) and is_finite(synth):
        if w == -1:
            return synth.to(base.dtype)
        step = difference(base, synth)
        return extrapolate(
            base, step, w, out=step if step.dtype == base.dtype else None
        )  # three tensors in memory, not four
    if on_mismatch == "error":
        what = (
            "contains entries that are not finite"
            if extrapolable
            else f"is {base.dtype} in the base and {synth.dtype} in the other"
        )
        raise ValueError(
            f"{name}: differs between base and self-trained model and {what}; it cannot be extrapolated. "
            "If it is no parameter, keep the base's entries with on_mismatch='keep_base' (--on-mismatch keep_base)"
        )
    if not extrapolable:
        return base
    finite = base.isfinite() & synth.isfinite()
    return torch.where(finite, extrapolate(base, difference(base, synth), w), base)


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite, without the temporary tensors of isfinite()."""
    return tensor.numel() == 0 or all(bound.isfinite().item() for bound in tensor.aminmax())


def difference(base: Tensor, synth: Tensor) -> Tensor:
    """synth - base in at least float32: bfloat16 would lose most of a short fine-tune."""
    dtype = torch.promote_types(torch.promote_types(base.dtype, synth.dtype), torch.float32)
    return synth.to(dtype) - base.to(dtype)


def extrapolate(base: Tensor, step: Tensor, w: float, out: Tensor | None = None) -> Tensor:
    """base - w step, rounded once to the base's dtype; written into `out` (of that dtype) if given."""
    if base.dtype == step.dtype:
        return torch.add(base, step, alpha=-w) if out is None else torch.add(base, step, alpha=-w, out=out)
    merged = torch.add(base.to(step.dtype), step, alpha=-w).to(base.dtype)
    return merged if out is None else out.copy_(merged)


def check_same_names(base: Mapping[str, Tensor], synth: Mapping[str, Tensor], on_mismatch: OnMismatch) -> None:
    if on_mismatch not in ("error", "keep_base"):
        raise ValueError(f"on_mismatch must be 'error' or 'keep_base', got {on_mismatch!r}")
    missing = [name for name in base if name not in synth]
    extra = [name for name in synth if name not in base]
    if on_mismatch == "error" and (missing or extra):
        first = (missing + extra)[:3]
        raise ValueError(
            f"base and self-trained model hold different entries: {len(missing)} of {len(base)} are missing in the "
            "self-trained model, "
            f"{len(extra)} are only there; first: {', '.join(first)}. Are both of the same network and the same "
            "weight set (ema)?"
        )


class LiveMerge:
    """Moves a resident model to any w in one pass over its parameters' memory.

    Base and difference stay on the model's device (twice the parameters' bytes). Buffers of the model are never
    touched. The parameters equal those of `reverse_merge` bit for bit.
    """

    def __init__(self, model: nn.Module, base: Mapping[str, Tensor], synth: Mapping[str, Tensor]):
        self._parameters = dict(model.named_parameters())
        missing = [name for name in self._parameters if name not in base or name not in synth]
        if missing:
            raise ValueError(
                f"{len(missing)} parameters of the model are missing in base or self-trained model; first: "
                f"{', '.join(missing[:3])}"
            )
        self._synth = synth
        self._base: dict[str, Tensor] = {}
        self._step: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            b, s = base[name].to(parameter.device), synth[name].to(parameter.device)
            if parameter.dtype != b.dtype:
                raise ValueError(
                    f"{name}: the model is {parameter.dtype}, the base {b.dtype}; LiveMerge works in the base's dtype"
                )
            if not (is_finite(b) and is_finite(s)):
                raise ValueError(
                    f"{name}: a parameter of base or self-trained model is not finite; nothing sensible can be "
                    "extrapolated"
                )
            self._base[name], self._step[name] = b.clone(), difference(b, s)

    @torch.no_grad()
    def set_w(self, w: float) -> None:
        """Give the model the weights theta_base - w (theta_syn - theta_base)."""
        if not math.isfinite(w):
            raise ValueError(f"w must be a finite number, got {w}")
        for name, parameter in self._parameters.items():
            if w == 0:
                parameter.copy_(self._base[name])
            elif w == -1:
                parameter.copy_(self._synth[name])
            else:
                extrapolate(self._base[name], self._step[name], w, out=parameter)


def random_direction(
    base: Mapping[str, Tensor], synth: Mapping[str, Tensor], parameters: Collection[str], seed: int
) -> dict[str, Tensor]:
    """A control in place of theta_syn: base + r, with r random, of the norm that synth - base has in every tensor."""
    control = dict(base)
    for name in parameters:
        step = difference(base[name], synth[name])
        noise = torch.randn(
            step.shape, generator=torch.Generator().manual_seed(derived_seed(seed, name)), dtype=step.dtype
        )
        norm = noise.norm()
        scaled = noise * (step.norm().cpu() / norm) if norm > 0 else torch.zeros_like(noise)
        control[name] = (base[name].to(step.dtype) + scaled.to(step.device)).to(base[name].dtype)
    return control


def step_size(
    base: Mapping[str, Tensor], synth: Mapping[str, Tensor], w: float, parameters: Collection[str]
) -> dict[str, float]:
    """How far the merge moves: `relative_step` = |synth - base| / |base| over all parameters, and `swallowed`, the
    share of moved entries that w (synth - base) cannot change in the base's dtype (bfloat16 swallows most of a short
    fine-tune)."""
    moved = unchanged = 0
    step_squares = base_squares = 0.0
    for name in parameters:
        b, step = base[name], difference(base[name], synth[name])
        step_squares += step.double().square().sum().item()
        base_squares += b.double().square().sum().item()
        does_move = step != 0
        moved += int(does_move.sum())
        unchanged += int((does_move & (extrapolate(b, step, w) == b)).sum()) if w != 0 else 0
    return {
        "relative_step": math.sqrt(step_squares / base_squares) if base_squares else 0.0,
        "swallowed": unchanged / moved if moved else 0.0,
    }
