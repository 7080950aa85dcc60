"""torchvision's datasets as image sets: `torchvision:CIFAR10:train:/data`. They are read where they lie, never
downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import Tensor

from neon.images.decode import pixels
from neon.images.image_set import ImageSet, Remarks, UnreadableImagesError

PREFIX = "torchvision:"
FORM = "torchvision:NAME:SPLIT:FOLDER, for example torchvision:CIFAR10:train:/data (empty SPLIT: the set has none)"


def open_torchvision(spec: str) -> ImageSet:
    """The dataset that `spec` (see FORM) names. Labels are kept where they are class indices.

    Raises ValueError for another form, an unknown name or split, and FileNotFoundError if the files are not in the
    folder.
    """
    parts = spec.removeprefix(PREFIX).split(":", 2)
    if len(parts) != 3:
        raise ValueError(f"{spec!r}: expected {FORM}")
    name, split, folder = parts
    kind = getattr(torchvision.datasets, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torchvision.datasets.VisionDataset)):
        raise ValueError(f"{spec!r}: torchvision has no dataset {name!r}")
    options = _split_option(kind, split)
    try:
        dataset = kind(folder, **options)
    except RuntimeError as error:  # torchvision's way to say that files are missing or damaged
        raise FileNotFoundError(f"{spec!r}: {error}") from error
    return _image_set(Path(spec), dataset)


def _split_option(kind: type, split: str) -> dict[str, bool | str]:
    known = inspect.signature(kind).parameters
    if "train" in known:
        if split not in ("train", "test"):
            raise ValueError(f"{kind.__name__} has the splits train and test, got {split!r}")
        return {"train": split == "train"}
    if "split" in known:
        return {"split": split}
    if split:
        raise ValueError(f"{kind.__name__} has no splits, got {split!r}; expected {FORM}")
    return {}


def _image_set(path: Path, dataset: torchvision.datasets.VisionDataset) -> ImageSet:
    remarks = Remarks()

    def image(index: int) -> Tensor:
        found = dataset[index][0]
        if not isinstance(found, Image.Image):
            raise UnreadableImagesError([f"{path}, item {index}: is {type(found).__name__}, expected an image"])
        return torch.tensor(pixels(f"{path}, item {index}", found, remarks))

    channels, height, width = shape = tuple(image(0).shape)

    def read(indices: Sequence[int]) -> Tensor:
        images = [image(i) for i in indices]
        other = next((i for i, one in zip(indices, images, strict=True) if tuple(one.shape) != shape), None)
        if other is not None:
            raise ValueError(
                f"{path}: item 0 is {shape}, item {other} {tuple(image(other).shape)}; resize them to one size first"
            )
        return torch.stack(images)

    targets = torch.as_tensor(targets) if (targets := getattr(dataset, "targets", None)) is not None else None
    labels = targets.long() if targets is not None and targets.ndim == 1 else None
    size = len(dataset)
    said = "torchvision" if labels is not None else "none: the set has no class indices"
    names = [f"{i:08d}" for i in range(size)]
    return ImageSet(path, names, (channels, height, width), labels, read, said, remarks)
