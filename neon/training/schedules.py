"""Learning rate and moving-average decay as functions of the images seen."""

from __future__ import annotations

import math

from neon.training.recipe import Training


def lr_at(recipe: Training, images_seen: int) -> float:
    """The rate of the update made after `images_seen` images: linear ramp from 0, constant, cosine to 0 at the end."""
    rate = recipe.lr
    if recipe.lr_ramp_images:
        rate *= min(images_seen / recipe.lr_ramp_images, 1.0)
    if recipe.lr_cosine_images:
        remaining = (recipe.images - images_seen) / recipe.lr_cosine_images
        rate *= 0.5 - 0.5 * math.cos(math.pi * min(max(remaining, 0.0), 1.0))
    return rate


def ema_beta(recipe: Training, images_seen: int, step: int) -> float:
    """Weight of the old average in the update made after `images_seen` images (`step` updates)."""
    if recipe.ema_decay is not None:
        return recipe.ema_decay
    if recipe.ema_power is not None:  # Karras et al. 2024, eq. 1, with t = step + 1
        return (1 - 1 / (step + 1)) ** (recipe.ema_power + 1)
    assert recipe.ema_halflife_images is not None
    halflife = recipe.ema_halflife_images
    if recipe.ema_rampup_ratio is not None:
        halflife = min(halflife, images_seen * recipe.ema_rampup_ratio)
    return 0.5 ** (recipe.batch / max(halflife, 1e-8))
