"""The xAR transformer: a velocity field for each cell of latent tokens, given the cells before it.

xAR: "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv 2502.20388). In training
every cell has its own noise level and attends to the *noised* earlier cells (noisy-context learning). In sampling a
finished cell is passed through the network again at time 0, and its keys and values are kept in a `KeyValueCache`.

B batch, C cells, P = 64 tokens of a cell, L tokens, D width, N heads, H head width, Z = 16 latent channels
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon.runtime.speed import Place, memory
from xar.cells import CELL_TOKENS, CHANNELS, NUM_CELLS, NUM_TOKENS, causal_mask, rotary_angles, rotary_frequencies

NORM_EPS = 1e-6
TIME_FREQUENCIES = 128
INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class XARArch:
    """Constructor arguments of an `XARTransformer`. Raises ValueError for sizes that do not fit together."""

    width: int
    num_heads: int
    encoder_depth: int
    decoder_depth: int
    """Blocks before and after the linear layer in the middle: one causal stack. The two names are those of the
    checkpoints."""
    num_classes: int = 1000
    """Labels 0 .. num_classes - 1; the label num_classes means "no class"."""

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.width % (4 * self.num_heads):
            raise ValueError(
                f"width must be a multiple of 4 x num_heads (rotary embedding: pairs, two axes); got {self.width}, "
                f"{self.num_heads}"
            )
        if min(self.encoder_depth, self.decoder_depth, self.num_classes) < 1:
            raise ValueError(f"encoder_depth, decoder_depth and num_classes must be >= 1; got {self}")


@dataclass(frozen=True)
class KeyValueCache(Place):
    """Keys (after rotation) and values of every block: (blocks, 2, B, N, 256, H).

    The tokens of cell c are those of the last call for that cell: of its latest noisy state while it is being sampled,
    then of the finished cell (time 0).
    """

    def rows(self, count: int) -> KeyValueCache:
        """A view of the first `count` images."""
        return KeyValueCache(self.tensor[:, :, :count])


def store(slot_2BNLH: Tensor, cell: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Write one cell's (B, N, 64, H) into a block's part of the cache; all keys and values up to and including that
    cell."""
    all_keys, all_values = slot_2BNLH[0], slot_2BNLH[1]
    end = (cell + 1) * CELL_TOKENS
    all_keys[:, :, end - CELL_TOKENS : end] = keys
    all_values[:, :, end - CELL_TOKENS : end] = values
    return all_keys[:, :, :end], all_values[:, :, :end]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight, in float32 whatever the input."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x) * self.weight


def normalise(x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(x.dtype)


class TimeEmbedding(nn.Module):
    """Integer timesteps 0 .. 1000 as cosines and sines, through a two-layer perceptron."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps: (...) int64. Returns (..., D)."""
        index = torch.arange(TIME_FREQUENCIES, device=timesteps.device, dtype=torch.float32)
        angles = timesteps[..., None].float() * torch.exp(-math.log(10000) * index / TIME_FREQUENCIES)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class RotaryEmbedding(nn.Module):
    """Two-dimensional rotary position embedding (EVA-02): channel pairs are turned by the angle of the token's row or
    column."""

    freqs: Tensor
    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_width: int):
        super().__init__()
        angles = rotary_angles(head_width)
        self.register_buffer("freqs", rotary_frequencies(head_width))
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor, first_cell: int) -> Tensor:
        """x: (B, N, L, H), the tokens of consecutive cells from `first_cell` on."""
        first = first_cell * CELL_TOKENS
        cos, sin = (table[first : first + x.shape[-2]] for table in (self.freqs_cos, self.freqs_sin))
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention in which a token sees all tokens of its own cell and of the earlier ones."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rope = RotaryEmbedding(width // num_heads)

    def forward(self, x_BCPD: Tensor, first_cell: int, slot_2BNLH: Tensor | None, dropout: float) -> Tensor:
        batch, cells, _, width = x_BCPD.shape
        qkv = self.qkv(x_BCPD).view(batch, cells * CELL_TOKENS, 3, self.num_heads, width // self.num_heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, N, L, H) each
        queries, keys = self.rope(queries, first_cell), self.rope(keys, first_cell)
        if slot_2BNLH is not None:
            keys, values = store(slot_2BNLH, first_cell, keys, values)
        # One call per cell with exactly the keys it may see: no mask to add, and no masked scores to compute.
        attended = []
        for cell, query in enumerate(queries.split(CELL_TOKENS, dim=2), start=first_cell):
            upto = slice((cell + 1) * CELL_TOKENS)
            attended.append(
                F.scaled_dot_product_attention(query, keys[:, :, upto], values[:, :, upto], dropout_p=dropout)
            )
        merged = torch.cat(attended, dim=2).transpose(1, 2).reshape(x_BCPD.shape)
        return F.dropout(self.proj(merged), dropout)


class GatedMLP(nn.Module):
    """fc2(GELU(fc1_g x) * fc1_x x) with the exact (erf) GELU."""

    def __init__(self, width: int):
        super().__init__()
        hidden = int(width * 4 * 2 / 3)  # as many weights as an ungated MLP of four times the width
        self.fc1_g = nn.Linear(width, hidden)
        self.fc1_x = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, dropout: float) -> Tensor:
        return F.dropout(self.fc2(F.dropout(F.gelu(self.fc1_g(x)) * self.fc1_x(x), dropout)), dropout)


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition of the cell (adaLN, DiT: arXiv 2212.09748)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.mlp = GatedMLP(width)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x_BCPD: Tensor, condition_BCD: Tensor, first_cell: int, slot_2BNLH: Tensor | None, dropout: float
    ) -> Tensor:
        modulation = self.ada_lin(condition_BCD)[:, :, None]  # one row per cell, broadcast over its tokens
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, dim=-1)
        x = x_BCPD
        x = x + gate1 * self.attn(normalise(x) * (1 + scale1) + shift1, first_cell, slot_2BNLH, dropout)
        return x + gate2 * self.mlp(normalise(x) * (1 + scale2) + shift2, dropout)


class XARTransformer(nn.Module):
    """Velocity (noise - data) of the tokens of one or several consecutive cells."""

    mask: Tensor

    def __init__(self, arch: XARArch):
        super().__init__()
        width, num_heads = arch.width, arch.num_heads
        self.num_heads = num_heads
        self.num_classes = arch.num_classes
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, NUM_TOKENS, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, NUM_TOKENS, width))
        self.register_buffer("mask", causal_mask())
        self.class_emb = nn.Embedding(arch.num_classes + 1, width)
        self.time_embed = TimeEmbedding(width)
        self.z_proj = nn.Linear(CHANNELS, width)
        self.z_proj_ln = RMSNorm(width)
        self.encoder_blocks = nn.ModuleList(Block(width, num_heads) for _ in range(arch.encoder_depth))
        self.encoder_norm = RMSNorm(width)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_blocks = nn.ModuleList(Block(width, num_heads) for _ in range(arch.decoder_depth))
        self.decoder_norm = RMSNorm(width)
        self.pred = nn.Linear(width, CHANNELS)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.class_emb.weight, self.encoder_pos_embed_learned, self.decoder_pos_embed_learned):
            nn.init.normal_(table, std=INIT_STD)

    def forward(
        self,
        x_BCPZ: Tensor,
        timesteps_BC: Tensor,
        labels_B: Tensor,
        *,
        first_cell: int = 0,
        cache: KeyValueCache | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Velocity (B, C, 64, 16) of C consecutive cells from `first_cell` on.

        timesteps: int64, 0 (data) to 1000 (noise), one per cell. Without a cache the cells must begin at cell 0
        (training: all four). With one (sampling, C = 1) the slots of the earlier cells are attended to, and the slot
        of this cell is written.
        """
        cells = x_BCPZ.shape[1]
        num_blocks = len(self.encoder_blocks) + len(self.decoder_blocks)
        slots = [None] * num_blocks if cache is None else cache.tensor.unbind()
        condition = self.class_emb(labels_B)[:, None] + self.time_embed(timesteps_BC)
        h = self.z_proj_ln(self.z_proj(x_BCPZ) + self._positions(self.encoder_pos_embed_learned, first_cell, cells))
        for block, slot in zip(self.encoder_blocks, slots[: len(self.encoder_blocks)], strict=True):
            h = block(h, condition, first_cell, slot, dropout)
        h = self.decoder_embed(self.encoder_norm(h)) + self._positions(
            self.decoder_pos_embed_learned, first_cell, cells
        )
        for block, slot in zip(self.decoder_blocks, slots[len(self.encoder_blocks) :], strict=True):
            h = block(h, condition, first_cell, slot, dropout)
        return self.pred(self.decoder_norm(h))

    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty cache for `batch` images (two rows per image under guidance), in the dtype of the attention."""
        weight = self.pred.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        num_blocks = len(self.encoder_blocks) + len(self.decoder_blocks)
        head_width = self.pred.in_features // self.num_heads
        shape = (num_blocks, 2, batch, self.num_heads, NUM_TOKENS, head_width)
        return KeyValueCache(memory(self, shape, dtype, weight.device))

    @staticmethod
    def _positions(table: Tensor, first_cell: int, cells: int) -> Tensor:
        return table.unflatten(1, (NUM_CELLS, CELL_TOKENS))[:, first_cell : first_cell + cells]
