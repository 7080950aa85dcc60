"""Attention over the scales of VAR: of a whole sequence in training, of one scale and a memory in sampling."""

# B batch, L tokens, C width, H heads, D head width

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(queries, keys, values of the new tokens, softmax scale), each (B, H, L, D) -> (B, H, L, D)."""

MAX_LOG_SCALE = math.log(100)


class BlockCausal:
    """Attention of a whole sequence: every scale sees itself and the coarser ones.

    One call per scale over the keys that it may see, so no L x L mask is needed and any fast kernel applies.
    """

    def __init__(self, bounds: Sequence[tuple[int, int]]):
        self.bounds = bounds

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        maps = [
            F.scaled_dot_product_attention(
                queries[:, :, start:end], keys[:, :, :end], values[:, :, :end], scale=softmax_scale
            )
            for start, end in self.bounds
        ]
        return torch.cat(maps, dim=2)


class Remembering:
    """Attention of one scale's tokens, which begin at `start`, to themselves and to what one block remembers of the
    coarser scales. slot_2BHLD: its keys and values, in the dtype of the computation.

    The last scale is used once, so it is not stored: for 512 px images it has nearly half of all tokens.
    """

    def __init__(self, slot_2BHLD: Tensor, start: int):
        self.keys, self.values, self.start = slot_2BHLD[0], slot_2BHLD[1], start

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        start, end = self.start, self.start + keys.shape[2]
        if end <= self.keys.shape[2]:
            self.keys[:, :, start:end], self.values[:, :, start:end] = keys, values
            keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        else:
            keys = torch.cat((self.keys[:, :, :start], keys), dim=2)
            values = torch.cat((self.values[:, :, :start], values), dim=2)
        return F.scaled_dot_product_attention(queries, keys, values, scale=softmax_scale)


class Attention(nn.Module):
    def __init__(self, embed_dim: int, heads: int, *, l2_norm: bool):
        super().__init__()
        self.heads = heads
        self.l2_norm = l2_norm
        # without the norm the published models use a quarter of the usual softmax scale
        self.softmax_scale = 1.0 if l2_norm else 0.25 / math.sqrt(embed_dim // heads)
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.q_bias = nn.Parameter(torch.zeros(embed_dim))
        self.v_bias = nn.Parameter(torch.zeros(embed_dim))
        self.register_buffer("zero_k_bias", torch.zeros(embed_dim))
        self.mat_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x_BLC: Tensor, attend: Attend) -> Tensor:
        batch, length, width = x_BLC.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x_BLC, self.mat_qkv.weight, bias).view(batch, length, 3, self.heads, width // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # each BHLD
        if self.l2_norm:
            sharpness = self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
            # under autocast the norm is float32; attention and memory are in the dtype of the values
            queries = F.normalize(queries, dim=-1).mul(sharpness).to(values.dtype)
            keys = F.normalize(keys, dim=-1).to(values.dtype)
        mixed = attend(queries, keys, values, self.softmax_scale)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
