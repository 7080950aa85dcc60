"""A set of images as everything here sees it: N uint8 images of one size, read by index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

Reader = Callable[[Sequence[int]], Tensor]
DARK = "hold no value above 1 (black, or numbers in [0, 1] under the type uint8?)"


class Remarks:
    """What a reader of a number should know about some files of a set: {what: names of the files}."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}

    def add(self, what: str, name: str) -> None:
        self.names.setdefault(what, set()).add(name)

    def update(self, other: Remarks) -> None:
        """Take over what another rank saw."""
        for what, names in other.names.items():
            self.names.setdefault(what, set()).update(names)

    def sentences(self) -> list[str]:
        """One per kind, with the number of files and the first of them."""
        return [f"{len(names)} file(s) {what}, first: {min(names)}" for what, names in sorted(self.names.items())]


@dataclass(frozen=True)
class ImageSet:
    """N images of one size, read on demand.

    read(indices) gives (len(indices), C, H, W) uint8 (a float type for sets of .npy latents).
    labels: (N,) int64 class indices, (N, K) float32 vectors, or None.
    labels_from: where the labels come from, or why there are none.
    remarks: grow while files are read: which are of a lossy format, hidden, turned ...
    """

    path: Path
    names: Sequence[str]
    shape: tuple[int, int, int]
    labels: Tensor | None
    read: Reader
    labels_from: str = "none: nobody gave any"
    remarks: Remarks = field(default_factory=Remarks)
    stored: Callable[[Sequence[int]], bytes] | None = None
    """Bytes that change when one of these images changes, got without decoding them; None: there is no such short way.
    """

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        """Classes by the labels (largest index + 1); 0 without labels."""
        if self.labels is None:
            return 0
        return self.labels.shape[1] if self.labels.ndim == 2 else int(self.labels.max()) + 1

    def batches(self, batch: int) -> Iterator[Tensor]:
        """All images in order; unreadable ones are an error at the end (see `parts`)."""
        ranges = [range(start, min(start + batch, len(self))) for start in range(0, len(self), batch)]
        return (images for _, images in self.parts(ranges))

    def parts(self, ranges: Sequence[range]) -> Iterator[tuple[range, Tensor]]:
        """These images, with their indices, up to the first file that cannot be used. What comes after it is read to
        name every such file in one error, but no longer given: the value would be thrown away."""
        bad: list[str] = []
        for indices in ranges:
            try:
                images = self.read(indices)
            except UnreadableImagesError as error:
                bad.extend(error.problems)
            else:
                if not bad:
                    self._remark_on_dark(indices, images)
                    yield indices, images
        if bad:
            raise UnreadableImagesError(bad)

    def _remark_on_dark(self, indices: Sequence[int], images: Tensor) -> None:
        if images.dtype == torch.uint8:
            for i in (images.flatten(1).amax(1) <= 1).nonzero()[:, 0].tolist():
                self.remarks.add(DARK, self.names[indices[i]])

    def fingerprint(self, most: int) -> str:
        """SHA-256 of shape, names, labels and the pixels of at most `most` images, evenly spaced: a replaced file is
        noticed when a training goes on."""
        digest = hashlib.sha256(repr((self.shape, len(self), self.names)).encode())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().tobytes())
        chosen = sorted({i * len(self) // most for i in range(most)}) if len(self) > most else list(range(len(self)))
        for start in range(0, len(chosen), 1024):
            digest.update(self.read(chosen[start : start + 1024]).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def content_hash(self, indices: Sequence[int]) -> bytes:
        """A hash of these images' content, wherever the set lies and whatever it is called."""
        stored = self.read(indices).numpy().tobytes() if self.stored is None else self.stored(indices)
        return hashlib.sha256(stored).digest()

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The images `indices`, in that order."""
        chosen = list(indices)
        labels = None if self.labels is None else self.labels[torch.tensor(chosen, dtype=torch.long)]
        names = [self.names[i] for i in chosen]
        return replace(
            self, names=names, labels=labels, stored=None, read=lambda want: self.read([chosen[i] for i in want])
        )

    def padded(self, pad: int) -> ImageSet:
        """The set with `pad` black pixels on every side of its images."""
        channels, height, width = self.shape
        shape = (channels, height + 2 * pad, width + 2 * pad)
        return replace(self, shape=shape, stored=None, read=lambda want: F.pad(self.read(want), (pad,) * 4))

    def in_memory(self) -> ImageSet:
        """The set with all its images in memory."""
        images = torch.cat(list(self.batches(1024)))
        return replace(self, read=lambda want: images[torch.as_tensor(list(want), dtype=torch.long)])


class UnreadableImagesError(ValueError):
    """Files of an image set that cannot be used, each with its reason."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        shown = "; ".join(self.problems[:3]).replace("\n", "\\n")  # names may hold line breaks
        super().__init__(
            f"{len(self.problems)} image file(s) cannot be used, first: {shown}. Mend or remove them; none is skipped "
            "silently"
        )
