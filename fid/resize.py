"""The bilinear resize of TensorFlow 1, which is part of what the name FID means."""

from __future__ import annotations

import torch
from torch import Tensor


def resize_tf1(images: Tensor, height: int, width: int) -> Tensor:
    """Resize float images (B, C, H, W) to (B, C, height, width) as `tf.image.resize_bilinear(align_corners=False)` did.

    Source coordinate = destination * in / out: no half-pixel shift, no antialiasing; the upper neighbour is clamped to
    the edge. PyTorch's `interpolate` has no such mode, and its two modes change an FID (clean-fid, arXiv 2104.11222).
    The size stays what it is when in = out.
    """
    return _lerp(_lerp(images, width, dim=3), height, dim=2)


def _lerp(images: Tensor, size: int, *, dim: int) -> Tensor:
    # float32 coordinates, as in the TensorFlow kernel: in float64 a few of them round to the other side of a pixel
    source = torch.arange(size, dtype=torch.float32, device=images.device) * (images.shape[dim] / size)
    lower = source.floor().long()
    upper = (lower + 1).clamp(max=images.shape[dim] - 1)
    fraction = (source - lower).to(images.dtype)
    if dim == 2:
        fraction = fraction[:, None]
    low, high = images.index_select(dim, lower), images.index_select(dim, upper)
    return low + (high - low) * fraction
