"""Neon's merge (arXiv 2510.03597, Algorithm 1): theta_neon = theta_base - w (theta_syn - theta_base).

w > 0 moves away from the self-trained model; w = 0 is the base and w = -1 the self-trained model, bit for bit. Nothing
is normalised. The difference form keeps a short fine-tune's small step exact; (1 + w) base - w syn would round it
twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from neon.buffers import parameters_among
from neon.seeds import derived_seed

OnMismatch = Literal["error", "keep_base"]
CHUNK = 1 << 20
"""Numbers that are worked on at a time where a wider copy of them is needed."""
MOST_W = 1e6
"""Published values lie below 10."""


def reverse_merge(
    base: Mapping[str, Tensor],
    synth: Mapping[str, Tensor],
    w: float,
    *,
    parameters: Collection[str] | None = None,
    on_mismatch: OnMismatch = "error",
) -> dict[str, Tensor]:
    """base - w (synth - base) for every parameter; everything else is the base's.

    base, synth: state dicts with equal keys and shapes; any float dtype, mixed allowed. The arithmetic is that of
        `difference` and `extrapolate`: at least float32, rounded to the base's dtype at the end.
    w: any number up to `MOST_W`, same units as the paper's.
    parameters: names that are extrapolated, all others are buffers and come from the base. None: what names and
        numbers tell (`neon.buffers`). Integers and masks (every entry 0 or infinite) always come from the base.
    on_mismatch: "error" refuses missing or extra names and entries that differ without being finite floats in both;
        "keep_base" keeps the base's entries there, which is what the published scripts did.
    Raises ValueError naming the first offending entries.
    """
    return dict(merged_entries(base, synth, w, parameters=parameters, on_mismatch=on_mismatch))


def check_states(base: object, synth: object) -> None:
    """Raises ValueError for what is no state dict. (Its tensors may lie in a file: they are looked at one by one.)"""
    for name, given in (("base", base), ("synth", synth)):
        if not isinstance(given, Mapping):
            advice = f": give {name}.state_dict()" if isinstance(given, nn.Module) else ""
            raise ValueError(f"{name} must be a state dict, tensors by name, not {type(given).__name__}{advice}")


def check_w(w: float) -> float:
    """w as a float. Raises ValueError for what is no number, and for numbers too large for the arithmetic of a
    float32."""
    is_number = isinstance(w, Real) or (isinstance(w, Tensor) and w.numel() == 1)
    if not (is_number and abs(w) <= MOST_W):
        raise ValueError(f"w must be a finite number of at most {MOST_W:g}, got {w}")
    return float(w)


def merged_entries(
    base: Mapping[str, Tensor],
    synth: Mapping[str, Tensor],
    w: float,
    *,
    parameters: Collection[str] | None = None,
    on_mismatch: OnMismatch = "error",
) -> Iterator[tuple[str, Tensor]]:
    """`reverse_merge` one entry at a time, in the base's order: with lazy mappings only one tensor is in memory."""
    w = check_w(w)
    check_same_names(base, synth, on_mismatch)
    moving = parameters_among(base, synth) if parameters is None else set(parameters)
    for name in base:
        if name in synth and name in moving:
            yield name, merge_tensor(name, base[name], synth[name], w, on_mismatch)
        else:
            yield name, base[name]


@torch.no_grad()  # parameters themselves are as good as a state dict
def merge_tensor(name: str, base: Tensor, synth: Tensor, w: float, on_mismatch: OnMismatch) -> Tensor:
    """base - w (synth - base) of one parameter, or the base where there is nothing to extrapolate. Raises ValueError,
    which names it, if it cannot be extrapolated."""
    for where, value in (("base", base), ("self-trained model", synth)):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name}: expected a tensor, found {type(value).__name__} in the {where}: name the state dict itself"
            )
    if base.shape != synth.shape:
        raise ValueError(
            f"{name}: the base has shape {tuple(base.shape)}, the self-trained model {tuple(synth.shape)}; not the "
            "same network"
        )
    if w == 0 or is_discrete(base) or same(base, synth):  # counters, frozen tensors: nothing to extrapolate
        return base
    extrapolable = base.is_floating_point() and synth.is_floating_point()
    if extrapolable and is_finite(base) and is_finite(synth):
        if w == -1:
            return synth.to(base.dtype)
        step = difference(base, synth)
        return extrapolate(
            base, step, w, out=step if step.dtype == base.dtype else None
        )  # three tensors in memory, not four
    if is_mask(base):
        return base
    if on_mismatch == "error":
        what = (
            "contains entries that are not finite"
            if extrapolable
            else f"is {base.dtype} in the base and {synth.dtype} in the other"
        )
        raise ValueError(
            f"{name}: differs between base and self-trained model and {what}; it cannot be extrapolated. "
            "If it is no parameter, say so: on_mismatch 'keep_base' keeps the base's entries there"
        )
    if not extrapolable:
        return base
    finite = is_finite_each(base) & is_finite_each(synth)
    return torch.where(finite, extrapolate(base, difference(base, synth), w), base)


def is_discrete(tensor: Tensor) -> bool:
    """Whether a tensor holds integers or flags: a counter, an index table, a mask."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def same(base: Tensor, synth: Tensor) -> bool:
    return base.dtype == synth.dtype and torch.equal(comparable(base), comparable(synth))


def comparable(tensor: Tensor) -> Tensor:
    """Float8 as float32, which holds all its values: torch compares no float8."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite, without the temporary tensors of isfinite()."""
    return tensor.numel() == 0 or all(bound.isfinite().item() for bound in comparable(tensor).aminmax())


def is_finite_each(tensor: Tensor) -> Tensor:
    return comparable(tensor).isfinite()


def is_mask(tensor: Tensor) -> bool:
    """Whether every entry is 0 or infinite, and some are infinite."""
    values = comparable(tensor)
    return bool(values.isinf().any()) and bool((values.isinf() | (values == 0)).all())


def difference(base: Tensor, synth: Tensor) -> Tensor:
    """synth - base in float32, or in float64 if one of them is: bfloat16 would lose most of a short fine-tune."""
    dtype = torch.float64 if torch.float64 in (base.dtype, synth.dtype) else torch.float32
    return synth.to(base.device, dtype) - base.to(dtype)


def extrapolate(base: Tensor, step: Tensor, w: float, out: Tensor | None = None) -> Tensor:
    """base - w step in the base's dtype; written into `out` (of that dtype) if given.

    float32 and float64: in that precision, as torch.add does it. Narrower: w times the step and the sum in float64,
    rounded to float32 and then to the base's dtype; w as a float32 would send ties of bfloat16 to the wrong side.
    """
    if base.dtype == step.dtype:
        return torch.add(base, step, alpha=-w) if out is None else torch.add(base, step, alpha=-w, out=out)
    merged = torch.empty_like(base, memory_format=torch.contiguous_format) if out is None else out
    if not merged.is_contiguous():
        return merged.copy_(extrapolate(base, step, w))
    device = torch.device("cpu") if base.device.type == "mps" else base.device  # MPS has no float64
    pieces = zip(*(t.reshape(-1).split(CHUNK) for t in (merged, base, step)), strict=True)
    for to, b, s in pieces:
        exact = torch.add(b.to(device, torch.float64), s.to(device, torch.float64), alpha=-w)
        to.copy_(exact.float() if to.itemsize < 4 else exact)
    return merged


def check_same_names(base: Mapping[str, Tensor], synth: Mapping[str, Tensor], on_mismatch: OnMismatch) -> None:
    check_states(base, synth)
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


def ties_of(model: nn.Module) -> dict[str, str]:
    """later name -> first name of parameters that go by several names (tied weights, a module in two places). A state
    dict holds them under each, `named_parameters` under the first alone."""
    first: dict[nn.Parameter, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    return {name: kept for name, parameter in every if (kept := first.setdefault(parameter, name)) != name}


class LiveMerge:
    """Moves a resident model to any w in one pass over its parameters' memory.

    base, synth: on any device, not copied and not to be changed; they are read once per move, tensor by tensor, so a
        checkpoint's lazy `tensors` cost no memory. On a GPU only the model itself takes the card's memory.
    Buffers of the model are never touched. The parameters equal those of `reverse_merge` bit for bit.
    """

    def __init__(self, model: nn.Module, base: Mapping[str, Tensor], synth: Mapping[str, Tensor]):
        check_states(base, synth)
        self._parameters, self._base, self._synth = dict(model.named_parameters()), base, synth
        missing = [name for name in self._parameters if name not in base or name not in synth]
        if missing:
            raise ValueError(
                f"{len(missing)} parameters of the model are missing in base or self-trained model; first: "
                f"{', '.join(missing[:3])}"
            )
        for name, parameter in self._parameters.items():
            b = base[name]
            if parameter.dtype != b.dtype:
                raise ValueError(
                    f"{name}: the model is {parameter.dtype}, the base {b.dtype}; LiveMerge works in the base's dtype"
                )
            if b.is_complex():
                raise ValueError(
                    f"{name}: a complex parameter cannot be extrapolated; let the network hold its parts as real "
                    "numbers, torch.view_as_real(x)"
                )
            if not (is_finite(b) and is_finite(synth[name])):
                raise ValueError(
                    f"{name}: a parameter of base or self-trained model is not finite; nothing sensible can be "
                    "extrapolated"
                )

    @torch.no_grad()
    def set_w(self, w: float) -> None:
        """Give the model the weights theta_base - w (theta_syn - theta_base)."""
        w = check_w(w)
        for name, parameter in self._parameters.items():
            if w == 0:
                parameter.copy_(self._base[name])
            elif w == -1:
                parameter.copy_(self._synth[name])
            else:
                base, synth = (tensors[name].to(parameter.device) for tensors in (self._base, self._synth))
                extrapolate(base, difference(base, synth), w, out=parameter)


class RandomDirection(Mapping[str, Tensor]):
    """A control in place of theta_syn: base + r, with r random, of the norm that synth - base has in every tensor.

    Made tensor by tensor when asked; a pure function of seed and name. Entries besides `parameters` are the base's.
    """

    def __init__(self, base: Mapping[str, Tensor], synth: Mapping[str, Tensor], parameters: Collection[str], seed: int):
        self._base, self._synth, self._parameters, self._seed = base, synth, frozenset(parameters), seed

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def __getitem__(self, name: str) -> Tensor:
        base = self._base[name]
        if name not in self._parameters:
            return base
        step = difference(base, self._synth[name].to(base.device))
        generator = torch.Generator().manual_seed(derived_seed(self._seed, name))
        noise = torch.randn(step.shape, generator=generator, dtype=step.dtype)
        norm = noise.norm()
        scaled = noise * (step.norm().cpu() / norm) if norm > 0 else torch.zeros_like(noise)
        return (base.to(step.dtype) + scaled.to(step.device)).to(base.dtype)


def step_size(
    base: Mapping[str, Tensor], synth: Mapping[str, Tensor], w: float, parameters: Collection[str]
) -> dict[str, float]:
    """How far the merge moves: `relative_step` = |synth - base| / |base| over all parameters (|synth - base| where
    every parameter of the base is 0), and `swallowed`, the share of moved entries that w (synth - base) cannot change
    in the base's dtype (bfloat16 swallows most of a short fine-tune)."""
    moved = unchanged = 0
    step_squares = base_squares = 0.0
    for name in parameters:
        b = base[name]
        if is_discrete(b) or name not in synth or is_mask(b):
            continue
        step = difference(b, synth[name])
        step_squares += step.double().square().sum().item()
        base_squares += b.double().square().sum().item()
        does_move = step != 0
        moved += int(does_move.sum())
        unchanged += int((does_move & (extrapolate(b, step, w) == b)).sum()) if w != 0 else 0
    return {
        "relative_step": math.sqrt(step_squares / (base_squares or 1.0)),
        "swallowed": unchanged / moved if moved else 0.0,
    }
