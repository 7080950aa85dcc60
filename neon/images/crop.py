"""The centre crop with which ImageNet is prepared for latent generators."""

from __future__ import annotations

from PIL import Image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central size x size pixels of `image` (any mode), scaled so that its shorter side fits. Identity at that
    size.

    Dhariwal and Nichol 2021 (arXiv 2105.05233), as the training of ADM, DiT, MAR and xAR prepares images: halve by box
    averaging while the shorter side is at least twice the target, one bicubic resize, crop. The last bits depend on the
    Pillow version.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
