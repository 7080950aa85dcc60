"""Where image files lie: a folder or a zip archive. Both give names and bytes, and leave nothing out in silence."""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fid.files import UNREADABLE, not_what_it_is_called
from neon.images.image_set import Remarks, UnreadableImagesError

HIDDEN = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"}
MAX_MEMBER_BYTES = 1 << 30
"""Of a zip: more than any picture, less than what a bomb unpacks to."""


class Files(Protocol):
    """Named files. names: relative paths with "/", hidden ones left out and remarked on."""

    names: list[str]

    def content(self, name: str) -> bytes:
        """Raises UnreadableImagesError with one sentence that names the file."""
        ...

    def digest(self, name: str) -> bytes:
        """Bytes that change when the file does."""
        ...


def is_hidden(name: str) -> bool:
    """Whether a file is nobody's image: it, or a folder above it, begins with a dot (.ipynb_checkpoints, .Trash-0,
    ._resource forks), or is what macOS, Windows or a NAS puts beside the files."""
    return any(part[:1] == "." or part in HIDDEN for part in name.split("/"))


def _visible(names: list[str], remarks: Remarks) -> list[str]:
    visible = []
    for name in names:
        if is_hidden(name):
            remarks.add("are hidden and not counted", name)
        else:
            visible.append(name)
    return visible


class FolderFiles:
    """The files below a folder. Links to folders are followed, except back to one that holds them.

    Raises ValueError if there are links that lead nowhere.
    """

    def __init__(self, root: Path, remarks: Remarks):
        self._root = root
        dangling: list[str] = []
        self.names = _visible(list(self._walk(root, "", (_identity(root),), dangling, remarks)), remarks)
        if dangling:
            raise ValueError(
                f"{root}: {len(dangling)} link(s) lead nowhere, first: {dangling[0]} -> "
                f"{os.readlink(root / dangling[0])}. Mend or remove them; none is skipped silently"
            )

    def _walk(
        self, folder: Path, prefix: str, above: tuple[tuple[int, int], ...], dangling: list[str], remarks: Remarks
    ) -> Iterator[str]:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_symlink() and not os.path.exists(entry.path):
                    if not is_hidden(name):
                        dangling.append(name)
                elif entry.is_dir():
                    inner = _identity(entry.path)
                    if inner in above:
                        remarks.add("are links back to a folder above them and not followed", name)
                    elif is_hidden(name):
                        remarks.add("are hidden and not counted", name)
                    else:
                        yield from self._walk(Path(entry.path), f"{name}/", (*above, inner), dangling, remarks)
                elif entry.is_file():
                    yield name
                else:
                    remarks.add("are pipes or devices and not counted", name)

    def content(self, name: str) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except OSError as error:
            raise UnreadableImagesError([f"{name}: cannot be read ({error.strerror})"]) from error

    def digest(self, name: str) -> bytes:
        try:
            return hashlib.sha256(self.content(name)).digest()
        except UnreadableImagesError:
            return b"unreadable"  # named, with all others, when the images are read


def _identity(folder: Path | str) -> tuple[int, int]:
    about = os.stat(folder)
    return about.st_dev, about.st_ino


class ZipFiles:
    """The members of a zip archive. Its directory is read once per process: parsing it for every image would make the
    cost of an image grow with the number of images. A forked process opens the file again, because the two would share
    one file position.

    Raises ValueError for what is no zip, encrypted members and names that stand twice in it.
    """

    def __init__(self, path: Path, remarks: Remarks):
        self._path = path
        self._owner, self._archive = os.getpid(), self._open()
        members = [info for info in self._archive.infolist() if not info.is_dir()]
        self._members = {info.filename.replace("\\", "/"): info for info in members}
        self.names = _visible(list(self._members), remarks)
        counts = Counter(info.filename.replace("\\", "/") for info in members)
        twice = [name for name in self.names if counts[name] > 1]
        if twice:
            raise ValueError(
                f"{path}: {len(twice)} name(s) stand in it more than once, first: {twice[0]}. Make the archive again"
            )
        locked = [name for name in self.names if self._members[name].flag_bits & 1]
        if locked:
            raise ValueError(
                f"{path}: {len(locked)} of {len(self.names)} files are encrypted, first: {locked[0]}. Unpack it with "
                "the password first"
            )

    def _open(self) -> zipfile.ZipFile:
        if (instead := not_what_it_is_called(self._path)) is not None:
            raise ValueError(f"{self._path}: {instead}")
        try:
            return zipfile.ZipFile(self._path)
        except UNREADABLE as error:
            raise ValueError(
                f"{self._path}: not a readable zip archive ({error}): truncated, or something else under this name"
            ) from error

    def content(self, name: str) -> bytes:
        if self._owner != os.getpid():
            self._owner, self._archive = os.getpid(), self._open()
        member = self._members[name]
        if member.file_size > MAX_MEMBER_BYTES:
            raise UnreadableImagesError([f"{name}: unpacks to {member.file_size >> 20} MiB, more than any picture"])
        try:
            return self._archive.read(member)
        except UNREADABLE as error:
            raise UnreadableImagesError([f"{name}: cannot be unpacked from {self._path.name} ({error})"]) from error

    def digest(self, name: str) -> bytes:
        member = self._members[name]
        return struct.pack("<QI", member.file_size, member.CRC)
