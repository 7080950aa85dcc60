"""Which entries of a state dict are buffers, told by name where nobody says how the network is built; what is called as
a buffer may be but is a learned parameter is told by its numbers.

Extrapolating a running variance gives a negative variance, and a counter has no direction: buffers are the base's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

NAMES = re.compile(
    r"""(.*\.)?(
    running_(mean|var)|num_batches_tracked       # batch and instance norm
    | n_averaged|num_updates|step|steps|counter  # averages of weights, schedules
    | (ema_)?cluster_size|embed_avg|ema_\w+_SV   # codebooks that follow their inputs
    | (attn_|attention_|causal_)?mask|masked_bias|attn_bias_for_masking
    | position_ids|relative_position_index|inv_freq
    | parametrizations\.\w+\.\d+\._[uv]          # power iteration of spectral norm
    )""",
    re.VERBOSE,
)
LEARNABLE = re.compile(r"(.*\.)?(step|steps|counter|(attn_|attention_|causal_)?mask)")
"""Names among them that parameters have too."""
LEAST_BAR = 1e4
"""What a mask adds where it bars something is at least so large; no learned number is."""


def buffers_among(names: Collection[str]) -> set[str]:
    """The names of running statistics, counters, masks and index tables.

    `weight_u` and `weight_v` count only beside a `weight_orig`, which spectral norm writes: weight norm has a
    parameter called `weight_v`. What is no float is a buffer too; the merge sees that when it has the tensor.
    """
    known = set(names)
    spectral = {f"{name.removesuffix('_orig')}_{vector}" for name in known if name.endswith("_orig") for vector in "uv"}
    return {name for name in known if NAMES.fullmatch(name)} | (spectral & known)


def parameters_among(base: Mapping[str, Tensor], synth: Mapping[str, Tensor]) -> set[str]:
    """The names of what is to be extrapolated, by the names of two state dicts and, where these leave it open, by their
    numbers."""
    buffers = buffers_among(base)
    doubtful = (name for name in buffers if name in synth and LEARNABLE.fullmatch(name))
    return set(base) - buffers | {name for name in doubtful if is_learned(base[name], synth[name])}


def is_learned(base: Tensor, synth: Tensor) -> bool:
    """Whether an entry of a name in LEARNABLE is a parameter: the fine-tune moved it, and its numbers are not those of
    a mask or of counters: whole in both models, or so large that they bar something."""
    if not (base.is_floating_point() and synth.is_floating_point() and base.shape == synth.shape and base.numel()):
        return False
    base, synth = base.double(), synth.double()
    is_whole = base.equal(base.round()) and synth.equal(synth.round())
    is_bar = not base.abs().max() < LEAST_BAR  # NaN too
    return not (is_whole or is_bar or base.equal(synth))
