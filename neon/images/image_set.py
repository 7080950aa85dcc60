"""A set of images as everything here sees it: N uint8 images of one size, read by index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

LOSSY = {".jpg", ".jpeg", ".jfif", ".webp"}
Reader = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class ImageSet:
    """N images of one size, read on demand.

    read(indices) gives (len(indices), C, H, W) uint8 (float32 for sets of .npy latents).
    labels: (N,) int64 class indices, (N, K) float32 vectors, or None.
    """

    path: Path
    names: Sequence[str]
    shape: tuple[int, int, int]
    labels: Tensor | None
    read: Reader

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        """Classes by the labels (largest index + 1); 0 without labels."""
        if self.labels is None:
            return 0
        return self.labels.shape[1] if self.labels.ndim == 2 else int(self.labels.max()) + 1

    @property
    def is_lossy(self) -> bool:
        """Whether any file is of a lossy format: its artefacts change an FID."""
        return any(PurePosixPath(name).suffix.lower() in LOSSY for name in self.names)

    def batches(self, batch: int) -> Iterator[Tensor]:
        """All images in order; unreadable ones are an error at the end (see `parts`)."""
        ranges = [range(start, min(start + batch, len(self))) for start in range(0, len(self), batch)]
        return (images for _, images in self.parts(ranges))

    def parts(self, ranges: Sequence[range]) -> Iterator[tuple[range, Tensor]]:
        """These images, with their indices. Files that cannot be read are collected and raised as one error at the
        end."""
        bad: list[str] = []
        for indices in ranges:
            try:
                yield indices, self.read(indices)
            except UnreadableImagesError as error:
                bad.extend(error.problems)
        if bad:
            raise UnreadableImagesError(bad)

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The images `indices`, in that order."""
        chosen = list(indices)
        labels = None if self.labels is None else self.labels[torch.tensor(chosen, dtype=torch.long)]
        return ImageSet(
            self.path,
            [self.names[i] for i in chosen],
            self.shape,
            labels,
            lambda want: self.read([chosen[i] for i in want]),
        )

    def mirrored(self) -> ImageSet:
        """Twice the set: the originals, then every image flipped left to right."""
        n = len(self)

        def read(want: Sequence[int]) -> Tensor:
            images = self.read([i % n for i in want])
            flip = torch.tensor([i >= n for i in want])
            return torch.where(flip[:, None, None, None], images.flip(-1), images)

        labels = None if self.labels is None else torch.cat([self.labels, self.labels])
        return ImageSet(self.path, [*self.names, *self.names], self.shape, labels, read)

    def padded(self, pad: int) -> ImageSet:
        """The set with `pad` black pixels on every side of its images."""
        channels, height, width = self.shape
        shape = (channels, height + 2 * pad, width + 2 * pad)
        return ImageSet(self.path, self.names, shape, self.labels, lambda want: F.pad(self.read(want), (pad,) * 4))


class UnreadableImagesError(ValueError):
    """Files of an image set that cannot be used, each with its reason."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        shown = "; ".join(self.problems[:3])
        super().__init__(
            f"{len(self.problems)} image file(s) cannot be used, first: {shown}. Mend or remove them; none is skipped "
            "silently"
        )


def pixels(name: str, image: Image.Image) -> np.ndarray:
    """(C, H, W) uint8 of a plain 8-bit grey or RGB image; anything else is refused under its name."""
    mode, array = (
        image.mode,
        np.asarray(image.convert("RGB") if image.mode == "P" and "transparency" not in image.info else image),
    )
    if array.dtype != np.uint8 or mode not in ("L", "RGB", "P") or array.ndim not in (2, 3):
        hints = {
            "RGBA": "an alpha channel",
            "LA": "an alpha channel",
            "I;16": "16 bits per channel",
            "I": "16 or 32 bits per channel",
        }
        raise UnreadableImagesError(
            [
                f"{name}: is of mode {mode} ({hints.get(mode, 'not 8-bit grey or RGB')}); convert it to 8-bit grey or "
                "RGB first"
            ]
        )
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
