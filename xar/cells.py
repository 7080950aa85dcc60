"""Where the tokens are: a 16 x 16 latent grid read as 2 x 2 cells of 8 x 8 tokens.

xAR (arXiv 2502.20388) predicts the cells one after the other, in raster order; inside a cell the tokens stand in raster
order too. Every table of a checkpoint (positions, rotary angles, mask) is stored in this order.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRID = 16
CELL = 8
NUM_CELLS = (GRID // CELL) ** 2
CELL_TOKENS = CELL * CELL
NUM_TOKENS = GRID * GRID
CHANNELS = 16


def to_cells(latents: Tensor) -> Tensor:
    """(B, 16, 16, 16) latents, channels first, as (B, 4, 64, 16): cell, token, channel."""
    batch = latents.shape[0]
    if latents.shape[1:] != (CHANNELS, GRID, GRID):
        raise ValueError(
            f"xAR latents must have shape (B, {CHANNELS}, {GRID}, {GRID}), got {tuple(latents.shape)}: "
            "the autoencoder's channels or the image size do not fit the model"
        )
    split = latents.view(batch, CHANNELS, GRID // CELL, CELL, GRID // CELL, CELL)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, NUM_CELLS, CELL_TOKENS, CHANNELS)


def from_cells(cells: Tensor) -> Tensor:
    """The inverse of `to_cells`: (B, 4, 64, 16) as (B, 16, 16, 16)."""
    batch = cells.shape[0]
    split = cells.view(batch, GRID // CELL, GRID // CELL, CELL, CELL, CHANNELS)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(batch, CHANNELS, GRID, GRID)


def token_positions() -> Tensor:
    """(256, 2) int64: row and column of every token, in cell order."""
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    raster = torch.stack([rows, columns])[None].repeat(1, CHANNELS // 2, 1, 1)
    return to_cells(raster)[0, ..., :2].reshape(NUM_TOKENS, 2)


def rotary_frequencies(head_width: int) -> Tensor:
    """(H / 4,) angular frequencies f_j = 10000^(-2j / (H / 2)) of two-dimensional rotary embedding (EVA-02)."""
    exponents = torch.arange(0, head_width // 2, 2).float() / (head_width // 2)
    return 1.0 / 10000**exponents


def rotary_angles(head_width: int) -> Tensor:
    """(256, H) angles in cell order: half of the channels by the row, half by the column, each frequency twice."""
    angles = token_positions()[..., None] * rotary_frequencies(head_width)  # (256, 2, H / 4)
    return angles.repeat_interleave(2, dim=-1).flatten(1)


def causal_mask() -> Tensor:
    """(1, 1, 256, 256) float32, 0 where a token may attend (its own cell and earlier ones), -inf elsewhere.

    Checkpoints hold it. Our attention does not need it: a cell's queries get the keys up to their own cell.
    """
    cell = torch.arange(NUM_TOKENS) // CELL_TOKENS
    mask = torch.zeros(NUM_TOKENS, NUM_TOKENS).masked_fill(cell[None, :] > cell[:, None], float("-inf"))
    return mask[None, None]
