"""Moving images by fractions of a pixel: reflection at the border, sym6 low-pass filters against aliasing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
PAD = len(SYM6) // 4


def warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Resample images (B, C, H, W) so that output position p shows input position inverse @ p.

    inverse: (B, 3, 3), homogeneous pixel coordinates about the image's centre, x first. The image is upsampled
    twice, warped bilinearly and downsampled, so that no transform blurs or aliases more than the identity.
    """
    channels, height, width = images.shape[1:]
    images, G = _pad(images, inverse)
    h = torch.tensor(SYM6, device=images.device)
    for axis in (3, 2):
        images = _upsample(images, h.flip(0), axis)
    ones = torch.ones((), device=G.device)
    G = scale2d(ones * 2, ones * 2) @ G @ scale2d(ones / 2, ones / 2)
    G = translate2d(-ones / 2, -ones / 2) @ G @ translate2d(ones / 2, ones / 2)
    out_height, out_width = (height + 2 * PAD) * 2, (width + 2 * PAD) * 2
    G = (
        scale2d(ones * 2 / images.shape[3], ones * 2 / images.shape[2])
        @ G
        @ scale2d(ones * out_width / 2, ones * out_height / 2)
    )
    grid = F.affine_grid(G[:, :2, :], [len(images), channels, out_height, out_width], align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    for axis in (3, 2):
        images = _downsample(images, h, axis)
    return images


def _pad(images: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Reflect as many pixels as any image of the batch looks at beyond its border."""
    height, width = images.shape[2:]
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[-cx, -cy, 1], [cx, -cy, 1], [cx, cy, 1], [-cx, cy, 1]], device=images.device)
    x, y = (inverse @ corners.T)[:, :2].unbind(dim=1)  # (B, 4)
    reach = torch.stack([-x.min(), -y.min(), x.max(), y.max()])
    reach = reach + torch.tensor([2 * PAD - cx, 2 * PAD - cy] * 2, device=images.device)
    limit = torch.tensor([width - 1, height - 1] * 2, device=images.device)
    left, top, right, bottom = reach.clamp(min=0).minimum(limit).ceil().long().tolist()
    images = F.pad(images, [left, right, top, bottom], mode="reflect")
    shift = torch.tensor([(left - right) / 2, (top - bottom) / 2], device=images.device)
    return images, translate2d(shift[0], shift[1]) @ inverse


def _upsample(images: Tensor, taps: Tensor, axis: int) -> Tensor:
    """Zeros between the pixels of one axis (none after the last), then the filter."""
    spread = torch.stack([images, torch.zeros_like(images)], dim=axis + 1).flatten(axis, axis + 1)
    spread = spread.narrow(axis, 0, spread.shape[axis] - 1)
    return _filter(spread, taps, axis, padding=2 * PAD, stride=1)


def _downsample(images: Tensor, taps: Tensor, axis: int) -> Tensor:
    """The filter, every second pixel of one axis, without the margin of the warp."""
    images = _filter(images, taps, axis, padding=2 * PAD - 1, stride=2)
    return images.narrow(axis, PAD, images.shape[axis] - 2 * PAD)


def _filter(images: Tensor, taps: Tensor, axis: int, *, padding: int, stride: int) -> Tensor:
    channels = images.shape[1]
    weight = taps.reshape((1, 1, 1, -1) if axis == 3 else (1, 1, -1, 1)).expand(channels, 1, -1, -1)
    along = (lambda value, other: (other, value)) if axis == 3 else (lambda value, other: (value, other))
    return F.conv2d(images, weight, groups=channels, padding=along(padding, 0), stride=along(stride, 1))


def reflect_shift(images: Tensor, tx: Tensor, ty: Tensor) -> Tensor:
    """Shift image b by tx[b] pixels to the right and ty[b] up; what enters is the image's reflection."""
    batch, _, height, width = images.shape
    x, y = torch.arange(width, device=images.device), torch.arange(height, device=images.device)
    x = _reflect(x - tx[:, None], width)[:, None, None, :]
    y = _reflect(y + ty[:, None], height)[:, None, :, None]
    which = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images[which, channel, y, x]


def _reflect(index: Tensor, size: int) -> Tensor:
    return size - 1 - (size - 1 - index % (2 * size - 2)).abs()


def translate2d(tx: Tensor, ty: Tensor) -> Tensor:
    """(*, 3, 3) homogeneous translation."""
    one, zero = torch.ones_like(tx), torch.zeros_like(tx)
    return _matrix([one, zero, tx, zero, one, ty, zero, zero, one])


def scale2d(sx: Tensor, sy: Tensor) -> Tensor:
    one, zero = torch.ones_like(sx), torch.zeros_like(sx)
    return _matrix([sx, zero, zero, zero, sy, zero, zero, zero, one])


def rotate2d(angle: Tensor) -> Tensor:
    """Counter-clockwise in a frame whose y axis points up."""
    one, zero, cos, sin = torch.ones_like(angle), torch.zeros_like(angle), angle.cos(), angle.sin()
    return _matrix([cos, -sin, zero, sin, cos, zero, zero, zero, one])


def _matrix(entries: list[Tensor]) -> Tensor:
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))
