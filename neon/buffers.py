"""Which entries of a state dict are buffers, told by name where nobody says how the network is built.

Extrapolating a running variance gives a negative variance, and a counter has no direction: buffers are the base's.
"""

from __future__ import annotations

import re
from collections.abc import Collection

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


def buffers_among(names: Collection[str]) -> set[str]:
    """The names of running statistics, counters, masks and index tables.

    `weight_u` and `weight_v` count only beside a `weight_orig`, which spectral norm writes: weight norm has a
    parameter called `weight_v`. What is no float is a buffer too; the merge sees that when it has the tensor.
    """
    known = set(names)
    spectral = {f"{name.removesuffix('_orig')}_{vector}" for name in known if name.endswith("_orig") for vector in "uv"}
    return {name for name in known if NAMES.fullmatch(name)} | (spectral & known)
