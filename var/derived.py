"""Entries of VAR checkpoints that are no weights but functions of patch_nums and the width."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

MASK = "attn_bias_for_masking"


def keep_published_entries(model: nn.Module) -> None:
    """Put the L x L attention mask of published files into the model's state dict, and drop it on loading: the model
    itself holds no mask."""
    model.register_state_dict_post_hook(_add_mask)
    model.register_load_state_dict_pre_hook(_drop_mask)


def attention_mask(levels_1L: Tensor) -> Tensor:
    """(1, 1, L, L) float32: 0 where the key's scale is not finer than the query's, else -inf."""
    is_hidden = levels_1L[:, None, :, None] < levels_1L[:, None, None, :]
    return torch.zeros(is_hidden.shape, device=levels_1L.device).masked_fill_(is_hidden, -torch.inf)


def scale_levels(patch_nums: tuple[int, ...]) -> Tensor:
    """(1, L) int64: the scale of every token."""
    return torch.tensor([[level for level, side in enumerate(patch_nums) for _ in range(side * side)]])


def check_derived(patch_nums: tuple[int, ...], stored: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError if levels, mask or zero biases of a file are not those of its network (they may be floats)."""
    levels = scale_levels(patch_nums)
    expected = {"lvl_1L": levels, MASK: attention_mask(levels)}
    for name in stored:
        if name in expected or name.endswith("zero_k_bias"):
            value = stored[name].float()
            if not torch.equal(value, expected.get(name, torch.zeros_like(value)).float()):
                raise ValueError(
                    f"{path}: {name} is not that of a VAR with patch_nums {list(patch_nums)}; "
                    "the file belongs to another network, or a merge has damaged it"
                )


def _add_mask(_model: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    names = list(state)
    after_levels = names[names.index(prefix + "lvl_1L") + 1 :]
    state[prefix + MASK] = attention_mask(state[prefix + "lvl_1L"])
    for name in after_levels:  # the published order
        state[name] = state.pop(name)


def _drop_mask(_model: nn.Module, state: dict[str, Tensor], prefix: str, *_unused: object) -> None:
    state.pop(prefix + MASK, None)
