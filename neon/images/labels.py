"""Labels of image files: from dataset.json (NVIDIA's format), else from class folders, else there are none.

Both are looked for below the folders that all files share, so an archive with one folder on top reads like one without.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neon.images.containers import Files
from neon.images.image_set import Remarks, UnreadableImagesError

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}
Found = tuple[Tensor | None, str]
"""Labels, and where they come from or why there are none."""


def file_labels(path: Path, names: Sequence[str], files: Files, remarks: Remarks) -> Found:
    """Labels of the image files `names` (sorted): (N,) int64 or (N, K) float32, or None.

    Raises ValueError, naming the file, where what is there cannot be meant: files outside the class folders, splits as
    classes, labels that are no class indices.
    """
    shared, there = _shared_folder(names), set(files.names)
    for depth in range(len(shared) + 1):
        listing = "/".join((*shared[:depth], "dataset.json"))
        if listing in there:
            local = [name.split("/", depth)[depth] for name in names]
            return _listed(f"{path}: {listing}", _bytes(path, listing, files), local, remarks)
    return _class_folders(path, [name.split("/", len(shared))[len(shared)] for name in names])


def _shared_folder(names: Sequence[str]) -> tuple[str, ...]:
    """The folders above all of the files: those that the first and the last of the sorted names share."""
    first, last = names[0].split("/")[:-1], names[-1].split("/")[:-1]
    depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return tuple(first[:depth])


def _class_folders(path: Path, names: Sequence[str]) -> Found:
    strays = [name for name in names if "/" not in name]
    if len(strays) == len(names):
        return None, "none: all images lie in one folder, and there is no dataset.json"
    if strays:
        raise ValueError(
            f"{path}: {len(strays)} of {len(names)} images lie outside the class folders, first: {strays[0]}. Move or "
            "remove them, or read the set without labels"
        )
    folders = [name.split("/")[0] for name in names]
    classes = class_order(set(folders))
    if all(name.lower().rstrip("0123456789_-") in SPLITS for name in classes):  # also Train/, val2017/
        raise ValueError(
            f"{path}: holds the splits {', '.join(classes)}, which are no classes. Name one of them, "
            f"{path}/{classes[0]}, or read the set without labels"
        )
    index = {name: i for i, name in enumerate(classes)}
    shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
    return torch.tensor([index[folder] for folder in folders]), f"{len(classes)} class folders, in this order: {shown}"


def class_order(folders: set[str]) -> list[str]:
    """Class folders in the order of their indices: by number if all names are numbers ("2" before "10"), else by
    name."""
    if all(folder.isascii() and folder.isdecimal() for folder in folders):
        return sorted(folders, key=lambda folder: (int(folder), folder))
    return sorted(folders)


def _bytes(path: Path, name: str, files: Files) -> bytes:
    try:
        return files.content(name)
    except UnreadableImagesError as error:
        raise ValueError(f"{path}: {error.problems[0]}") from error


def _listed(where: str, data: bytes, names: Sequence[str], remarks: Remarks) -> Found:
    """Labels from dataset.json: {"labels": [[name, label], ...]} or {"labels": null}."""
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: is no JSON ({error})") from error
    if not isinstance(content, dict) or "labels" not in content:
        found = (
            f"a {type(content).__name__}" if not isinstance(content, dict) else f"the keys {', '.join(content)[:200]}"
        )
        raise ValueError(f'{where}: expected {{"labels": [[file, label], ...]}}, found {found}')
    entries = content["labels"]
    if entries is None:
        return None, "none: dataset.json says that there are none"
    if not isinstance(entries, list) or not all(
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) for entry in entries
    ):
        raise ValueError(f'{where}: expected "labels" to be a list of [file, label]')
    by_name: dict[str, object] = {}
    for name, label in entries:
        plain = name.replace("\\", "/").removeprefix("./")
        if by_name.setdefault(plain, label) != label:
            raise ValueError(f"{where}: {plain} has two labels, {by_name[plain]} and {label}")
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(f"{where} has no label for {len(missing)} of {len(names)} images, first: {missing[0]}")
    for name in sorted(set(by_name) - set(names)):
        remarks.add("are in dataset.json and not in the set", name)
    values = [by_name[name] for name in names]
    _check_kind(where, names, values)
    labels = checked_labels(where, np.array(values))
    if labels is not None and labels.ndim == 1:
        _check_order(where, names, labels)
    return labels, "dataset.json" if labels is not None else "none: all in dataset.json are -1"


def _check_kind(where: str, names: Sequence[str], values: Sequence[object]) -> None:
    """All labels are class indices, or all are vectors of one length."""
    kinds = {len(value) if isinstance(value, list) else None for value in values}
    for name, value in zip(names, values, strict=True):
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
            raise ValueError(
                f"{where}: the label of {name} is {json.dumps(value)[:60]}, expected a class index or numbers"
            )
    if len(kinds) > 1:
        raise ValueError(f"{where}: the labels differ in kind or length: {sorted(map(str, kinds))}")


def checked_labels(where: str, labels: np.ndarray) -> Tensor | None:
    """(N,) int64 class indices or (N, K) float32 vectors; all -1 means that there are none.

    Raises ValueError for strings, fractions, negative or infinite numbers.
    """
    if labels.dtype.kind not in "iuf" or labels.ndim not in (1, 2) or not np.isfinite(labels).all():
        raise ValueError(
            f"{where}: labels are {labels.dtype} {labels.shape}, expected whole numbers (N,) or finite vectors (N, K)"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        raise ValueError(f"{where}: labels are a column {labels.shape}: give class indices as {labels.shape[:1]}")
    if labels.ndim == 2:
        return torch.from_numpy(labels.astype(np.float32))
    if len(labels) and (labels == -1).all():
        return None
    wrong = labels[(labels < 0) | (labels != np.floor(labels)) | (labels >= 2**31)]
    if len(wrong):
        raise ValueError(f"{where}: {len(wrong)} labels are no class index 0, 1, 2 ..., first: {wrong[0]}")
    return torch.from_numpy(labels.astype(np.int64))


def _check_order(where: str, names: Sequence[str], labels: Tensor) -> None:
    """dataset.json may have been made from numbered folders in the order "0", "1", "10", "2": say so, do not guess."""
    folders = [name.split("/")[0] for name in names if "/" in name]
    if len(folders) < len(names) or not all(folder.isdecimal() for folder in folders):
        return
    of_folder: dict[str, int] = {}
    for folder, label in zip(folders, labels.tolist(), strict=True):
        if of_folder.setdefault(folder, label) != label:
            return  # the folders are no classes
    by_name, by_number = sorted(of_folder), class_order(set(of_folder))
    if by_name != by_number and [of_folder[folder] for folder in by_name] == list(range(len(by_name))):
        first = next(folder for i, folder in enumerate(by_number) if of_folder[folder] != i)
        raise ValueError(
            f"{where} numbers the folders in the order of their names (0, 1, 10, 2 ...): folder {first} has the label "
            f"{of_folder[first]}. Remove it to take the folders in the order of their numbers, or rename them"
        )
