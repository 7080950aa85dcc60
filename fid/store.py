"""Features kept for the metrics that need every one of them: in memory, or in a memory-mapped file past a limit."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


class FeatureStore:
    """float32 rows (num_images, dim); row i belongs to image i in whatever batch, rank or order it arrives.

    file: where the rows lie, so that a killed run finds them again. Without one they are in memory, or, beyond
    `limit_mib`, in a temporary file that goes away with the store.
    """

    def __init__(self, num_images: int, dim: int, *, file: Path | None = None, limit_mib: int = 1024):
        self.num_images, self.dim = num_images, dim
        self.has_row = torch.zeros(num_images, dtype=torch.bool)
        self.path, self._is_kept, self._temporary = file, file is not None, None
        if file is None and num_images * dim * 4 > limit_mib * 2**20:
            self._temporary = tempfile.NamedTemporaryFile(prefix="neon-features-")  # noqa: SIM115 - lives as long as the store
            self.path = Path(self._temporary.name)
        size = num_images * dim
        if self.path is not None:
            _reserve(self.path, size * 4)
        flat = torch.empty(size) if self.path is None else torch.from_file(str(self.path), shared=True, size=size)
        self._rows = flat.view(num_images, dim)
        self._checksums = torch.zeros(num_images, dtype=torch.int64)

    def put(self, indices: Sequence[int], features: Tensor) -> None:
        """Keep features (B, dim) of the images `indices`. Raises ValueError if an image comes twice or does not
        exist."""
        index = torch.as_tensor(list(indices), dtype=torch.long)
        if features.shape != (len(index), self.dim):
            raise ValueError(
                f"expected features ({len(index)}, {self.dim}) for {len(index)} images, got {tuple(features.shape)}"
            )
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.num_images:
            raise ValueError(
                f"images {int(index.min())} to {int(index.max())} do not fit into a store of {self.num_images}"
            )
        if self.has_row[index].any() or len(index.unique()) < len(index):
            raise ValueError(f"an image among {int(index.min())} to {int(index.max())} came twice")
        rows = features.detach().to("cpu", torch.float32)
        self._rows[index] = rows
        self._checksums[index] = _checksums(rows)
        self.has_row[index] = True

    def taken(self) -> tuple[Tensor, Tensor]:
        """Indices (n,) of the images that are there, and their rows (n, dim)."""
        index = self.has_row.nonzero()[:, 0]
        return index, self._rows[index]

    def state(self) -> dict[str, Tensor]:
        """Which rows are there, and the rows themselves, or their checksums if they lie in a file of their own."""
        about = {"checksums": self._checksums.clone()} if self._is_kept else {"rows": self._rows.clone()}
        return {"has_row": self.has_row.clone()} | about

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`: rows that were put after it was taken count as absent.

        Raises ValueError if the file no longer holds the rows that it held then.
        """
        self.has_row = state["has_row"].clone()
        if not self._is_kept:
            self._rows.copy_(state["rows"])
            return
        self._checksums = state["checksums"].clone()
        for part in self.has_row.nonzero()[:, 0].split(4096):
            if not torch.equal(_checksums(self._rows[part]), self._checksums[part]):
                raise ValueError(f"{self.path}: does not hold the features that were saved (removed or damaged)")

    def tensor(self) -> Tensor:
        """(num_images, dim) in the order of the images, memory-mapped if the store is. Raises ValueError if a row is
        missing."""
        missing = int((~self.has_row).sum())
        if missing:
            raise ValueError(f"{missing} of {self.num_images} images have no features yet")
        return self._rows


def _reserve(path: Path, num_bytes: int) -> None:
    """Make the file at least so long, with the space on the disk: a map into space that is not there would end the
    process with SIGBUS on a full disk."""
    with open(path, "ab") as file:
        try:
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:  # other systems have no such call: zeros take the space
                file.write(bytes(max(0, num_bytes - path.stat().st_size)))
        except OSError as error:
            what = f"{error.strerror}: {num_bytes >> 20} MiB are needed here for the features of the images"
            raise OSError(error.errno, what, str(path)) from error


def _checksums(rows: Tensor) -> Tensor:
    """(n,) int64 of rows (n, dim) float32: a sum of their bits, each with an odd weight of its own."""
    bits = rows.contiguous().view(torch.int32).to(torch.int64)
    return (bits * torch.arange(1, 2 * rows.shape[1], 2)).sum(1)
