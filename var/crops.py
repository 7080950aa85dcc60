"""The augmentation of VAR's recipe: enlarge by 1.125, crop back at random, perhaps mirror. On the device, per image."""

# B batch, C channels, H height, W width, R side of the crop

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

FIXED_POINT_BITS = 22
"""Pillow rounds the coefficients of its resampling to this many bits and each pass to uint8; so does this module."""


def resized_size(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) once the shorter side is `shorter` and the aspect ratio is kept."""
    return (shorter, int(shorter * width / height)) if height <= width else (int(shorter * height / width), shorter)


def resized_crops(images: Tensor, *, shorter: int, side: int, top: Tensor, left: Tensor, is_flipped: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> uint8 (B, C, R, R): Lanczos resize of the shorter side to `shorter`, mirror, crop of
    `side`.

    Equal, bit for bit, to Pillow's resize(LANCZOS) of every image followed by the crop. Only the cropped pixels are
    computed.

    top, left: (B,) int64 corners of the crop in the resized (and mirrored) image. is_flipped: (B,) bool.
    Raises ValueError if a crop leaves the resized image.
    """
    height, width = resized_size(images.shape[2], images.shape[3], shorter)
    if min(height, width) < side:
        raise ValueError(f"a crop of {side} is larger than the resized {height} x {width} image")
    if top.device.type == "cpu" and (top.max() > height - side or left.max() > width - side):
        # elsewhere the host would wait for the device, whose indexing checks itself
        raise ValueError(
            f"a crop of {side} at ({int(top.max())}, {int(left.max())}) leaves the resized {height} x {width} image"
        )
    window = torch.arange(side, device=images.device)
    columns = left[:, None] + window
    columns = torch.where(is_flipped[:, None], width - 1 - columns, columns)
    across = _matrix_on(images.shape[3], width, images.device)[columns]  # (B, R, W)
    down = _matrix_on(images.shape[2], height, images.device)[top[:, None] + window]  # (B, R, H)
    narrow = _fixed_point(torch.einsum("bchw,brw->bchr", images.double(), across))
    return _fixed_point(torch.einsum("bchr,bsh->bcsr", narrow, down)).to(torch.uint8)


def _fixed_point(sums: Tensor) -> Tensor:
    """Integer sums of coefficient times pixel -> pixels, rounded half up. float64 holds these integers exactly."""
    return ((sums + (1 << (FIXED_POINT_BITS - 1))) / (1 << FIXED_POINT_BITS)).floor().clamp(0, 255)


@functools.cache
def _matrix_on(old: int, new: int, device: torch.device) -> Tensor:
    return lanczos_matrix(old, new).to(device)


@functools.cache
def lanczos_matrix(old: int, new: int) -> Tensor:
    """(new, old) float64 with integer entries: the coefficients of resizing a row of `old` pixels, times 2^22.

    Windowed sinc of three lobes, stretched when shrinking. Equal sizes copy.
    """
    if old == new:
        return torch.eye(old, dtype=torch.float64) * (1 << FIXED_POINT_BITS)
    step = old / new
    stretch = max(step, 1.0)
    rows = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        center = (row + 0.5) * step
        first = max(int(center - 3 * stretch + 0.5), 0)
        end = min(int(center + 3 * stretch + 0.5), old)
        weights = [_lanczos((pixel - center + 0.5) / stretch) for pixel in range(first, end)]
        total = sum(weights)
        for pixel, weight in zip(range(first, end), weights, strict=True):
            scaled = weight / total * (1 << FIXED_POINT_BITS)
            rows[row, pixel] = math.trunc(scaled + math.copysign(0.5, scaled))
    return rows


def _lanczos(x: float) -> float:
    if x == 0:
        return 1.0
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


def _sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)
