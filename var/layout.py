"""The layout of VAR checkpoints: entries that are functions of the others, and what the shapes tell about the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from var.transformer import Transformer

MASK = "attn_bias_for_masking"


def keep_published_layout(model: Transformer) -> None:
    """Published files hold the L x L attention mask, a function of patch_nums: written on export, verified and dropped on
    loading, never kept in memory."""
    model.register_state_dict_post_hook(_add_mask)
    model.register_load_state_dict_pre_hook(_verify_derived)


def attention_mask(levels_1L: Tensor) -> Tensor:
    """(1, 1, L, L) float32: 0 where the key's scale is not finer than the query's, else -inf."""
    is_hidden = levels_1L[:, None, :, None] < levels_1L[:, None, None, :]
    return torch.zeros(is_hidden.shape, device=levels_1L.device).masked_fill_(is_hidden, -torch.inf)


def _add_mask(model: Transformer, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    names = list(state)
    after_levels = names[names.index(prefix + "lvl_1L") + 1 :]
    state[prefix + MASK] = attention_mask(model.lvl_1L)
    for name in after_levels:  # the published order
        state[name] = state.pop(name)


def _verify_derived(model: Transformer, state: dict[str, Tensor], prefix: str, *_unused: object) -> None:
    mask, levels = state.pop(prefix + MASK, None), state.get(prefix + "lvl_1L")
    if levels is None or levels.is_meta or model.lvl_1L.is_meta:
        return
    expected = model.lvl_1L.to(levels.device)
    # merged files of the original hold the levels in float32
    if levels.shape != expected.shape or not torch.equal(levels.to(expected.dtype), expected):
        raise ValueError(f"lvl_1L in the checkpoint does not belong to a VAR with patch_nums {list(model.patch_nums)}")
    if mask is not None and not torch.equal(mask.to(expected.device).float(), attention_mask(expected)):
        raise ValueError(f"{MASK} in the checkpoint does not belong to a VAR with patch_nums {list(model.patch_nums)}")


def arch_of(state: Mapping[str, Tensor]) -> dict[str, object]:
    """Constructor arguments (`VARArch`) of the network whose state dict this is.

    What shapes cannot tell follows the published models: drop_path = 0.1 depth / 24 and, in a network without
    attn_l2_norm, heads of width 64. Raises ValueError if entries that every VAR has are missing.
    """
    needed = ("pos_1LC", "lvl_1L", "word_embed.weight", "class_emb.weight", "head.weight", "blocks.0.attn.proj.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        first = ", ".join(list(state)[:3])
        raise ValueError(f"not a VAR state dict: {', '.join(missing)} missing among {len(state)} entries (first: {first})")
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    embed_dim, code_width = state["word_embed.weight"].shape
    scale_mul = state.get("blocks.0.attn.scale_mul_1H11")
    tokens_per_scale = torch.bincount(state["lvl_1L"].flatten().long()).tolist()
    return {
        "depth": depth,
        "embed_dim": embed_dim,
        "heads": embed_dim // 64 if scale_mul is None else scale_mul.shape[1],
        "patch_nums": [math.isqrt(count) for count in tokens_per_scale],
        "num_classes": state["class_emb.weight"].shape[0] - 1,
        "vocabulary": state["head.weight"].shape[0],
        "code_width": code_width,
        "shared_aln": "shared_ada_lin.1.weight" in state,
        "attn_l2_norm": scale_mul is not None,
        "drop_path": 0.1 * depth / 24,
    }
