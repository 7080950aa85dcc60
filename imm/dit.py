"""The diffusion transformer of IMM: patches, adaptive layer norm on (t, s, class), two time embeddings.

Peebles and Xie 2022 (arXiv 2212.09748), with a second time s as in Zhou et al. 2025 (arXiv 2503.07565).
Attribute names are the published state-dict keys. B batch, N tokens, D width, P patch size, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[cos(t f), sin(t f)] with f_k = 10000^(-2k / dim): (B,) -> (B, dim) float64; an odd dim ends in a zero."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def position_table(dim: int, grid_size: int) -> Tensor:
    """Sine-cosine position of every patch, row by row: (grid_size^2, dim) float64, the column's half first."""
    row, column = torch.meshgrid(*[torch.arange(grid_size, dtype=torch.float64)] * 2, indexing="ij")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [axis.reshape(-1, 1) * frequencies for axis in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


class TimeEmbedding(nn.Module):
    """A time (B,) -> (B, D): sinusoids or random Fourier features, then an MLP unless use_mlp is false."""

    freqs: Tensor

    def __init__(
        self,
        hidden_size: int,
        frequency_embedding_size: int = 256,
        embedding_type: str = "positional",
        use_mlp: bool = True,
        scale: float = 1.0,
    ):
        super().__init__()
        if embedding_type not in ("positional", "fourier"):
            raise ValueError(f"embedding_type must be 'positional' or 'fourier', got {embedding_type!r}")
        if not use_mlp and frequency_embedding_size != hidden_size:
            raise ValueError(
                f"without an MLP frequency_embedding_size ({frequency_embedding_size}) must be hidden_size "
                f"({hidden_size})"
            )
        self.size = frequency_embedding_size
        self.is_fourier = embedding_type == "fourier"
        if self.is_fourier:
            self.register_buffer("freqs", torch.randn(frequency_embedding_size // 2) * scale)
        self.mlp = nn.Sequential()
        if use_mlp:
            first, last = nn.Linear(frequency_embedding_size, hidden_size), nn.Linear(hidden_size, hidden_size)
            for layer in (first, last):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, t: Tensor) -> Tensor:
        if self.is_fourier:
            angles = torch.outer(t.double(), 2 * math.pi * self.freqs.double())
            features = torch.cat([angles.cos(), angles.sin()], dim=1)
        else:
            features = sinusoid(t, self.size)
        return self.mlp(features.to(t.dtype))


class LabelEmbedding(nn.Module):
    """Class index (B,) -> (B, D); the row after the last class means "no class"."""

    def __init__(self, num_rows: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, index: Tensor) -> Tensor:
        return self.embedding_table(index)


class PatchEmbedding(nn.Module):
    """Images (B, C, H, W) -> tokens (B, N, D), one per patch, row by row."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(hidden_size, -1))
        nn.init.zeros_(self.proj.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention over tokens, optionally with a layer norm on every head's queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, *, has_qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        head_norm = partial(nn.LayerNorm, hidden_size // num_heads) if has_qk_norm else nn.Identity
        self.q_norm, self.k_norm = head_norm(), head_norm()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # each (B, heads, N, D / heads)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, hidden_size: int, inner_size: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x), approximate="tanh"))))


def modulation(hidden_size: int, num_vectors: int) -> nn.Sequential:
    """c -> shifts, scales and gates; zero at initialisation, so that a fresh block is the identity."""
    linear = nn.Linear(hidden_size, num_vectors * hidden_size)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift. x: (B, N, D); shift, scale: (B, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention and MLP, each with a shift, scale and gate from the conditioning c (B, D)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, dropout: float, *, has_qk_norm: bool):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, has_qk_norm=has_qk_norm)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), dropout)
        for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.adaLN_modulation = modulation(hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_attn[:, None] * self.attn(modulated_norm(x, shift_attn, scale_attn))
        return x + gate_mlp[:, None] * self.mlp(modulated_norm(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> pixels of their patches (B, N, P * P * C)."""

    def __init__(self, hidden_size: int, num_outputs: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, num_outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated_norm(x, shift, scale))


class DiT(nn.Module):
    """Images and two times -> images. Arguments are those that published checkpoints store."""

    def __init__(
        self,
        img_resolution: int,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.0,
        num_classes: int = 1000,
        s_embed: bool = True,
        qk_norm: bool = False,
        embedding_kwargs: Mapping[str, int | float | str | bool] | None = None,
        temb_mult: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        if img_resolution % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"patch_size {patch_size} must divide img_resolution {img_resolution}; num_heads {num_heads} and 4 "
                f"must divide hidden_size {hidden_size}"
            )
        if temb_mult != 1:
            raise ValueError(f"temb_mult must be 1 (no other value ever worked), got {temb_mult}")
        self.img_resolution, self.patch_size, self.in_channels = img_resolution, patch_size, in_channels
        make: Callable[..., TimeEmbedding] = TimeEmbedding  # the arguments come from a file
        time_embedding = partial(make, hidden_size, **(embedding_kwargs or {}))
        self.pos_embed = nn.Parameter(position_table(hidden_size, img_resolution // patch_size).float()[None])
        self.s_embedder = time_embedding() if s_embed else None
        self.x_embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.t_embedder = time_embedding()
        self.y_embedder = LabelEmbedding(num_classes + 1 + (class_dropout_prob > 0), hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, dropout, has_qk_norm=qk_norm) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, class_labels: Tensor | None) -> Tensor:
        """x: (B, C, H, W) of the constructor's resolution; t, s: (B,) or (1,); class_labels: one-hot (B or 1, Y), zeros
        = no class."""
        expected = (self.in_channels, self.img_resolution, self.img_resolution)
        if x.shape[1:] != expected:
            raise ValueError(f"this DiT takes images of shape {expected}, got {tuple(x.shape[1:])}")
        if class_labels is None:
            raise ValueError("a DiT needs class labels: one-hot rows, or rows of zeros for no class")
        c = self.t_embedder(t)
        if self.s_embedder is not None:
            c = c + self.s_embedder(s)
        c = (c + self.y_embedder(class_index(class_labels))).expand(len(x), -1)
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, c)
        return self._image(self.final_layer(tokens, c))

    def _image(self, tokens: Tensor) -> Tensor:
        """(B, N, P * P * C) -> (B, C, H, W); inside a token the channel runs fastest."""
        side = self.img_resolution // self.patch_size
        patches = tokens.unflatten(1, (side, side)).unflatten(3, (self.patch_size, self.patch_size, self.in_channels))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def class_index(class_labels: Tensor) -> Tensor:
    """One-hot (B, Y) -> index (B,); a row of zeros gets the index Y, which means no class."""
    return torch.cat([class_labels, 1 - class_labels.sum(1, keepdim=True)], dim=1).argmax(1)


SIZES: dict[str, dict[str, int]] = {
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
}
PATCH_SIZES: Sequence[int] = (2, 4, 8)
