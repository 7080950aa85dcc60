"""Non-leaking augmentation: geometric and colour transforms whose parameters are also inputs of the network (Karras et
al. 2022, arXiv 2206.00364, appendix F.2, after arXiv 2006.06676).

Every transform of a `Pipe` draws its parameters and one uniform per image, the gate: the transform applies where the
gate is below its multiplier times the pipe's probability. `draw` makes these numbers, `augment` uses them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edm.warp import reflect_shift, rotate2d, scale2d, translate2d, warp
from neon.family import Draws
from neon.seeds import Rng

SHIFT = 0.125
"""Translations: largest for whole pixels, standard deviation for fractions; as a share of the image."""
SCALE_STD = 0.2
"""Scalings: standard deviation of log2."""
ANISO_ROTATED = 0.5
"""Share of images whose anisotropic scaling is along a random direction instead of x; it does not depend on p."""


@dataclass(frozen=True, kw_only=True)
class Pipe:
    """Transforms in the order in which they are drawn and applied; each field is a multiplier of `p`, 0 switches it
    off."""

    p: float = 1.0
    xflip: float = 0.0
    yflip: float = 0.0
    rotate_int: float = 0.0
    translate_int: float = 0.0
    scale: float = 0.0
    rotate_frac: float = 0.0
    aniso: float = 0.0
    translate_frac: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    lumaflip: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0

    def active(self) -> list[str]:
        return [name for name in TRANSFORMS if getattr(self, name) > 0]

    @property
    def label_dim(self) -> int:
        """Number of augmentation labels that the network gets."""
        return sum(TRANSFORMS[name] for name in self.active())


TRANSFORMS = {  # number of labels of each
    "xflip": 1,
    "yflip": 1,
    "rotate_int": 2,
    "translate_int": 2,
    "scale": 1,
    "rotate_frac": 2,
    "aniso": 2,
    "translate_frac": 2,
    "brightness": 1,
    "contrast": 1,
    "lumaflip": 1,
    "hue": 2,
    "saturation": 1,
}


def training_pipe(p: float) -> Pipe:
    """EDM's training augmentation (9 labels). Half of the images are mirrored whatever p is: the large multiplier lets
    every image pass the gate."""
    return Pipe(p=p, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)


def draw(pipe: Pipe, rng: Rng) -> Draws:
    """Per active transform NAME: `NAME` (B,) or (B, 2) raw parameters and `NAME_gate` (B,) uniforms, in the published
    order."""
    draws: Draws = {}
    for name in pipe.active():
        if name in ("xflip", "yflip", "lumaflip"):
            draws[name] = rng.integers(2)
        elif name == "rotate_int":
            draws[name] = rng.integers(4)
        elif name == "translate_int":
            draws[name] = rng.uniform((2,))
        elif name == "translate_frac":
            draws[name] = rng.normal((2,))
        elif name in ("rotate_frac", "hue"):
            draws[name] = rng.uniform(())
        else:
            draws[name] = rng.normal(())
        if name == "aniso":
            draws["aniso_angle"] = rng.uniform(())
        draws[f"{name}_gate"] = rng.uniform(())
        if name == "aniso":
            draws["aniso_angle_gate"] = rng.uniform(())
    return draws


def augment(pipe: Pipe, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """The transformed images (B, C, H, W) and their augmentation labels (B, pipe.label_dim), float32.

    draws: from `draw`. Labels are 0 for an untransformed image.
    """
    labels: list[Tensor] = []
    with torch.autocast(images.device.type, enabled=False):  # half precision would blur the images
        images = _blit(pipe, images, draws, labels)
        images = _geometry(pipe, images, draws, labels)
        images = _colour(pipe, images, draws, labels)
    if not labels:
        return images, images.new_zeros(len(images), 0)
    return images, torch.stack([label.float() for label in labels], dim=1)


def _gated(pipe: Pipe, name: str, draws: Draws, value: Tensor) -> Tensor:
    """The parameter where the transform applies, 0 elsewhere. value: (B,) or (B, 2)."""
    hit = draws[f"{name}_gate"] < getattr(pipe, name) * pipe.p
    return torch.where(hit.reshape(-1, *[1] * (value.ndim - 1)), value, torch.zeros_like(value))


def _per_pixel(condition: Tensor) -> Tensor:
    return condition[:, None, None, None]


def _blit(pipe: Pipe, images: Tensor, draws: Draws, labels: list[Tensor]) -> Tensor:
    """Transforms that only move whole pixels."""
    for name, axis in (("xflip", 3), ("yflip", 2)):
        if getattr(pipe, name) > 0:
            w = _gated(pipe, name, draws, draws[name])
            images = torch.where(_per_pixel(w == 1), images.flip(axis), images)
            labels.append(w)
    if pipe.rotate_int > 0:
        w = _gated(pipe, "rotate_int", draws, draws["rotate_int"])
        flips_x, flips_y = (w == 1) | (w == 2), (w == 2) | (w == 3)
        images = torch.where(_per_pixel(flips_x), images.flip(3), images)
        images = torch.where(_per_pixel(flips_y), images.flip(2), images)
        images = torch.where(_per_pixel((w == 1) | (w == 3)), images.transpose(2, 3), images)
        labels += [flips_x, flips_y]
    if pipe.translate_int > 0:
        w = _gated(pipe, "translate_int", draws, draws["translate_int"] * 2 - 1)
        height, width = images.shape[2:]
        tx, ty = (w[:, 0] * width * SHIFT).round(), (w[:, 1] * height * SHIFT).round()
        images = reflect_shift(images, tx.long(), ty.long())
        labels += [tx / (width * SHIFT), ty / (height * SHIFT)]
    return images


def _geometry(pipe: Pipe, images: Tensor, draws: Draws, labels: list[Tensor]) -> Tensor:
    """Scaling, rotation, anisotropy and shift by fractions of a pixel, in one filtered warp."""
    height, width = images.shape[2:]
    inverse = torch.eye(3, device=images.device)  # G maps output to input pixels, about the image's centre
    if pipe.scale > 0:
        w = _gated(pipe, "scale", draws, draws["scale"])
        s = (w * SCALE_STD).exp2()
        inverse = inverse @ scale2d(1 / s, 1 / s)
        labels.append(w)
    if pipe.rotate_frac > 0:
        w = _gated(pipe, "rotate_frac", draws, (draws["rotate_frac"] * 2 - 1) * math.pi)
        inverse = inverse @ rotate2d(w)
        labels += [w.cos() - 1, w.sin()]
    if pipe.aniso > 0:
        w = _gated(pipe, "aniso", draws, draws["aniso"])
        r = (draws["aniso_angle"] * 2 - 1) * math.pi
        r = torch.where(draws["aniso_angle_gate"] < ANISO_ROTATED, r, torch.zeros_like(r))
        s = (w * SCALE_STD).exp2()
        inverse = inverse @ rotate2d(-r) @ scale2d(1 / s, s) @ rotate2d(r)
        labels += [w * r.cos(), w * r.sin()]
    if pipe.translate_frac > 0:
        w = _gated(pipe, "translate_frac", draws, draws["translate_frac"])
        inverse = inverse @ translate2d(-w[:, 0] * width * SHIFT, -w[:, 1] * height * SHIFT)
        labels += [w[:, 0], w[:, 1]]
    return images if inverse.ndim == 2 else warp(images, inverse)


def _colour(pipe: Pipe, images: Tensor, draws: Draws, labels: list[Tensor]) -> Tensor:
    """Affine maps of RGB: the upper three rows of M, (B, 4, 4)."""
    names = [name for name in ("brightness", "contrast", "lumaflip", "hue", "saturation") if getattr(pipe, name) > 0]
    if not names:
        return images
    batch, channels = images.shape[:2]
    if channels not in (1, 3):
        raise ValueError(f"colour augmentation needs grey or RGB images, got {channels} channels")
    M = torch.eye(4, device=images.device).repeat(batch, 1, 1)
    for name in names:
        step, step_labels = _colour_step(pipe, name, draws)
        M = step.to(images.device) @ M
        labels += step_labels
    flat = images.flatten(2)
    if channels == 3:
        flat = M[:, :3, :3] @ flat + M[:, :3, 3:]
    else:
        m = M[:, :3, :].mean(dim=1, keepdim=True)
        flat = m[:, :, :3].sum(dim=2, keepdim=True) * flat + m[:, :, 3:]
    return flat.reshape(images.shape)


def _colour_step(pipe: Pipe, name: str, draws: Draws) -> tuple[Tensor, Sequence[Tensor]]:
    """One transform as a matrix (B, 4, 4) on (R, G, B, 1), with its labels."""
    raw = draws[name]
    eye = torch.eye(4, device=raw.device)
    luma = torch.tensor([1.0, 1.0, 1.0, 0.0], device=raw.device) / math.sqrt(3)
    along = luma.outer(luma)
    w = _gated(pipe, name, draws, (raw * 2 - 1) * math.pi if name == "hue" else raw)
    per_image = w[:, None, None].float()
    if name == "brightness":
        shift = torch.zeros(4, 4, device=raw.device)
        shift[:3, 3] = 1
        return eye + shift * (per_image * 0.2), [w]
    if name == "contrast":
        rgb = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], device=raw.device))
        return rgb * (per_image * 0.5).exp2() + (eye - rgb), [w]
    if name == "lumaflip":
        return eye - 2 * along * per_image, [w]
    if name == "hue":
        return _rotation_about_grey(w), [w.cos() - 1, w.sin()]
    return along + (eye - along) * per_image.exp2(), [w]


def _rotation_about_grey(angle: Tensor) -> Tensor:
    """Right-handed rotations (B, 4, 4) of RGB about (1, 1, 1), by Rodrigues' formula."""
    a = 1 / math.sqrt(3)
    cross = torch.tensor([[0, -a, a], [a, 0, -a], [-a, a, 0]], device=angle.device)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    upper = (
        torch.eye(3, device=angle.device) * cos
        + cross * sin
        + torch.full((3, 3), 1 / 3, device=angle.device) * (1 - cos)
    )
    return F.pad(upper, (0, 1, 0, 1)) + torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0], device=angle.device))
