"""The VAR transformer: next-scale prediction over token maps (Tian et al. 2024, arXiv 2404.02905).

Attribute names are the keys of the published checkpoints.
"""

# B batch, L tokens, C width, H heads, D head width, V vocabulary, Z code width, K scales

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neon.runtime.speed import Place, memory
from var.attention import Attend, Attention, BlockCausal, Remembering
from var.derived import keep_published_entries, scale_levels

NORM_EPS = 1e-6
MAX_SIDE = 256
"""Of a token map; the largest published one is 32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VARArch:
    """Constructor arguments of a `Transformer`. Raises ValueError for sizes that do not fit together."""

    depth: int
    patch_nums: tuple[int, ...]
    """Side of the token map of every scale, coarse to fine."""
    embed_dim: int
    """Width; the published models have 64 depth."""
    heads: int
    """The published models have one per 64 of the width."""
    num_classes: int = 1000
    """Labels 0 .. num_classes - 1; the label num_classes means "no class"."""
    vocabulary: int = 4096
    """Number of entries of the tokeniser's codebook."""
    code_width: int = 32
    """Width of these entries."""
    shared_aln: bool = False
    """One modulation shared by all blocks plus a learned offset per block (d36)."""
    attn_l2_norm: bool = True
    """Queries and keys of unit norm, with a learned temperature per head."""
    drop_path: float = 0.0
    """Rate of stochastic depth at the last block; it grows linearly from 0 at the first."""

    def __post_init__(self) -> None:
        if self.depth < 1 or self.heads < 1 or self.embed_dim % self.heads:
            raise ValueError(
                f"embed_dim must be a multiple of heads, and depth >= 1; got {self.embed_dim}, {self.heads}, "
                f"{self.depth}"
            )
        if len(self.patch_nums) < 2 or any(not 1 <= side <= MAX_SIDE for side in self.patch_nums):
            raise ValueError(
                f"patch_nums must be at least two sides of 1 to {MAX_SIDE}, coarse to fine; got {list(self.patch_nums)}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")


def scale_bounds(patch_nums: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end) of every scale in the token sequence: scale-major, row-major inside a scale."""
    return list(pairwise(accumulate((side * side for side in patch_nums), initial=0)))


def normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm without parameters, modulated by the class; scale, shift: (B, 1, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS).mul(scale.add(1)).add_(shift)


class FeedForward(nn.Module):
    def __init__(self, embed_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulation(nn.Sequential):
    """Class embedding (B, C) -> (B, 1, parts, C). Index 1 is the Linear, as in the checkpoints."""

    def __init__(self, embed_dim: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(embed_dim, parts * embed_dim))
        self.parts = parts

    def forward(self, cond_BC: Tensor) -> Tensor:
        return super().forward(cond_BC).view(cond_BC.shape[0], 1, self.parts, -1)

    @property
    def weight(self) -> Tensor:
        """(parts, C, C)"""
        return cast(nn.Linear, self[1]).weight.unflatten(0, (self.parts, -1))


class Block(nn.Module):
    def __init__(self, arch: VARArch, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        if arch.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, arch.embed_dim) / math.sqrt(arch.embed_dim))
        self.attn = Attention(arch.embed_dim, arch.heads, l2_norm=arch.attn_l2_norm)
        self.ffn = FeedForward(arch.embed_dim)
        self.ada_lin = None if arch.shared_aln else Modulation(arch.embed_dim, 6)

    def shrink_modulation(self) -> None:
        """Part of the initialisation: the gammas begin near 0."""
        six = self.ada_gss[0, 0] if self.ada_lin is None else self.ada_lin.weight
        six[:2].mul_(1e-5)
        six[2:].mul_(0.5)

    def conditioning(self, cond_BC: Tensor, shared_B16C: Tensor | None) -> Tensor:
        """(B, 1, 6, C): gamma1, gamma2, scale1, scale2, shift1, shift2; 1 = attention, 2 = feed-forward."""
        if self.ada_lin is None:
            assert shared_B16C is not None
            return self.ada_gss + shared_B16C
        return self.ada_lin(cond_BC)

    def forward(self, x_BLC: Tensor, six_B16C: Tensor, attend: Attend, kept_B2: Tensor | None = None) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six_B16C.unbind(2)
        attended = self.attn(normalise(x_BLC, scale1, shift1), attend).mul(gamma1)
        x_BLC = x_BLC + self._dropped(attended, kept_B2, 0)
        return x_BLC + self._dropped(self.ffn(normalise(x_BLC, scale2, shift2)).mul(gamma2), kept_B2, 1)

    def _dropped(self, branch_BLC: Tensor, kept_B2: Tensor | None, index: int) -> Tensor:
        if kept_B2 is None or self.drop_path == 0:
            return branch_BLC
        return branch_BLC * (kept_B2[:, index, None, None].to(branch_BLC.dtype) / (1 - self.drop_path))


class Head(nn.Module):
    """The modulation before the last Linear."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.ada_lin = Modulation(embed_dim, 2)


@dataclass(frozen=True)
class Conditioning:
    """Everything that depends on the label alone: computed once per call."""

    start: Tensor  # (B, C) class embedding, the first tokens
    blocks: Tensor  # (depth, B, 1, 6, C)
    head: Tensor  # (B, 1, 2, C): scale, shift


class Transformer(nn.Module):
    """Logits of every scale's tokens given the coarser scales."""

    lvl_1L: Tensor  # noqa: N815 - the published name

    def __init__(self, arch: VARArch):
        super().__init__()
        embed_dim = arch.embed_dim
        self.patch_nums = arch.patch_nums
        self.num_classes = arch.num_classes
        self.bounds = scale_bounds(arch.patch_nums)
        first, length = self.bounds[0][1], self.bounds[-1][1]
        self.pos_start = nn.Parameter(torch.empty(1, first, embed_dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, length, embed_dim))
        self.register_buffer("lvl_1L", scale_levels(arch.patch_nums))
        self.word_embed = nn.Linear(arch.code_width, embed_dim)
        self.class_emb = nn.Embedding(arch.num_classes + 1, embed_dim)
        self.lvl_embed = nn.Embedding(len(arch.patch_nums), embed_dim)
        self.shared_ada_lin = Modulation(embed_dim, 6) if arch.shared_aln else None
        rates = [arch.drop_path * block / max(arch.depth - 1, 1) for block in range(arch.depth)]
        self.blocks = nn.ModuleList(Block(arch, rate) for rate in rates)
        self.head_nm = Head(embed_dim)
        self.head = nn.Linear(embed_dim, arch.vocabulary)
        self.initialise()
        keep_published_entries(self)

    @property
    def stack(self) -> list[Block]:
        """The blocks, first to last."""
        return cast("list[Block]", list(self.blocks))

    def conditioning(self, labels: Tensor) -> Conditioning:
        """labels: (B,) int64 in 0 .. num_classes."""
        cond_BC = self.class_emb(labels)
        shared = None if self.shared_ada_lin is None else self.shared_ada_lin(cond_BC)
        blocks = [block.conditioning(cond_BC, shared) for block in self.stack]
        return Conditioning(cond_BC, torch.stack(blocks), self.head_nm.ada_lin(cond_BC))

    def positions(self, start: int, end: int) -> Tensor:
        """(1, end - start, C) sum of the position and level embeddings."""
        return self.lvl_embed(self.lvl_1L[:, start:end]) + self.pos_1LC[:, start:end]

    def first_tokens(self, conditioning: Conditioning) -> Tensor:
        """(B, first scale's tokens, C) input of the first scale."""
        return conditioning.start[:, None] + self.pos_start + self.positions(*self.bounds[0])

    def scale_tokens(self, features_BLZ: Tensor, scale: int) -> Tensor:
        """(B, L_scale, C) input of a later scale from the features that the coarser scales have built."""
        return self.word_embed(features_BLZ).float() + self.positions(*self.bounds[scale])

    def next_logits(self, x_BLC: Tensor, blocks_NB16C: Tensor, head_B12C: Tensor, memory: Place, scale: int) -> Tensor:
        """(B, L, V) float32 of one scale from its tokens; N = depth. memory: of the coarser scales; this one's keys and
        values are added to it."""
        attends = [Remembering(slot, self.bounds[scale][0]) for slot in memory.tensor.unbind()]
        return self._logits(x_BLC, blocks_NB16C, head_B12C, attends)

    def _logits(
        self,
        x_BLC: Tensor,
        blocks_NB16C: Tensor,
        head_B12C: Tensor,
        attends: Sequence[Attend],
        kept: Tensor | None = None,
    ) -> Tensor:
        for index, block in enumerate(self.stack):
            x_BLC = block(x_BLC, blocks_NB16C[index], attends[index], None if kept is None else kept[:, index])
        scale, shift = head_B12C.unbind(2)
        return self.head(normalise(x_BLC.float(), scale, shift)).float()

    def forward(self, labels: Tensor, features: Tensor, kept: Tensor | None = None) -> Tensor:
        """Teacher-forced logits (B, L, V), float32.

        labels: (B,) int64, `num_classes` for dropped ones.
        features: (B, L - first scale, Z) input of every scale but the first. It may end after a coarser scale, and the
            logits then end there. Raises ValueError if it ends inside a scale.
        kept: (B, depth, 2) bool, which attention and feed-forward branches survive drop path; None keeps all.
        """
        length = self.bounds[0][1] + features.shape[1]
        bounds = [(start, end) for start, end in self.bounds if end <= length]
        if bounds[-1][1] != length:
            raise ValueError(
                f"{length} tokens end inside a scale; the scales {list(self.patch_nums)} end at "
                f"{[end for _, end in self.bounds]}"
            )
        conditioning = self.conditioning(labels)
        with torch.autocast(features.device.type, enabled=False):
            start = conditioning.start[:, None] + self.pos_start
            x_BLC = torch.cat((start, self.word_embed(features.float())), dim=1) + self.positions(0, length)
        attends = [BlockCausal(bounds)] * len(self.blocks)
        return self._logits(x_BLC, conditioning.blocks, conditioning.head, attends, kept)

    def sampling_memory(self, batch: int) -> Place:
        """Empty keys and values (depth, 2, B, H, L, D) of all scales but the last, for one sampling call. batch: rows,
        two per image under guidance."""
        weight = self.head.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        heads = self.stack[0].attn.heads
        shape = (len(self.blocks), 2, batch, heads, self.bounds[-1][0], self.pos_1LC.shape[-1] // heads)
        return Place(memory(self, shape, dtype, weight.device))

    @torch.no_grad()
    def initialise(self) -> None:
        """The published initial weights: normal of variance 1/(3C), with small heads, residual branches and gammas."""
        std = math.sqrt(1 / (3 * self.pos_1LC.shape[-1]))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        nn.init.trunc_normal_(self.pos_start, std=std)
        nn.init.trunc_normal_(self.pos_1LC, std=std)
        self.head.weight.mul_(0.02)
        self.head_nm.ada_lin.weight.mul_(0.5)
        for block in self.stack:
            block.attn.proj.weight.div_(math.sqrt(2 * len(self.stack)))
            block.ffn.fc2.weight.div_(math.sqrt(2 * len(self.stack)))
            block.shrink_modulation()
