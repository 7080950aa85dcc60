"""What reading costs does not grow with the set: directories are parsed once, arrays are read where they lie."""

import gzip
import os
import struct
import zipfile

import numpy as np
import pytest
import torch

from neon.images import arrays
from neon.images.formats import open_images, write_zip

IMAGES = torch.randint(256, (300, 3, 6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def count_directory_reads(monkeypatch) -> list[str]:
    """Every time that a zip's central directory is parsed."""
    reads: list[str] = []
    parse = zipfile.ZipFile._RealGetContents

    def counted(self):
        reads.append(self.filename)
        return parse(self)

    monkeypatch.setattr(zipfile.ZipFile, "_RealGetContents", counted)
    return reads


@pytest.mark.parametrize("count", [10, 300])
def test_a_zip_s_directory_is_read_once_whatever_the_number_of_images(tmp_path, monkeypatch, count):
    write_zip(tmp_path / "set.zip", iter([IMAGES[:count]]), None)
    reads = count_directory_reads(monkeypatch)
    images = open_images(tmp_path / "set.zip")
    for i in range(count):
        images.read([i])
    assert len(reads) == 1


def test_a_forked_process_reads_through_a_handle_of_its_own(tmp_path):
    """Two processes that share one file position would read each other's images."""
    write_zip(tmp_path / "set.zip", iter([IMAGES]), None)
    images = open_images(tmp_path / "set.zip")
    children = []
    for start in (0, 100):
        child = os.fork()
        if child == 0:
            same = all(torch.equal(images.read([i])[0], IMAGES[i]) for _ in range(5) for i in range(start, start + 200))
            os._exit(0 if same else 1)
        children.append(child)
    assert all(torch.equal(images.read([i])[0], IMAGES[i]) for i in range(300))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_a_large_compressed_array_is_streamed(tmp_path, monkeypatch, layout):
    stored = IMAGES.numpy() if layout == "nchw" else IMAGES.permute(0, 2, 3, 1).numpy()
    np.savez_compressed(tmp_path / "set.npz", arr_0=np.ascontiguousarray(stored))
    monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(arrays.StreamedRows, "BLOCK_BYTES", 100)
    images = open_images(tmp_path / "set.npz")
    opened: list[int] = []
    restart = arrays.read_array_header
    monkeypatch.setattr(arrays, "read_array_header", lambda stream: (opened.append(1), restart(stream))[1])
    assert torch.equal(torch.cat(list(images.batches(7))), IMAGES)
    assert len(opened) == 1  # from front to back in one go
    strided = [images.read(range(start, start + 5)) for start in range(0, 300, 25)]
    assert torch.equal(torch.cat(strided), torch.cat([IMAGES[start : start + 5] for start in range(0, 300, 25)]))
    assert len(opened) == 2
    assert torch.equal(images.read([299, 3, 3, 17]), IMAGES[[299, 3, 3, 17]])


def test_a_stored_array_is_mapped(tmp_path, monkeypatch):
    """Neither numpy nor zipfile reads its data: only the pages that are asked for are touched."""
    np.savez(tmp_path / "set.npz", images=IMAGES.numpy())
    read = zipfile.ZipExtFile.read
    most = 0

    def measured(self, n=-1):
        nonlocal most
        data = read(self, n)
        most = max(most, len(data))
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", measured)
    images = open_images(tmp_path / "set.npz")
    assert torch.equal(images.read([250, 1]), IMAGES[[250, 1]])
    assert most < 1000 < IMAGES.numel()


def test_a_failed_set_leaves_nothing_behind(tmp_path):
    def fails():
        yield IMAGES[:10]
        raise ValueError("the eleventh image")

    (tmp_path / "set.zip").write_bytes(b"the old set")
    with pytest.raises(ValueError, match="the eleventh image"):
        write_zip(tmp_path / "set.zip", fails(), None)
    assert [file.name for file in tmp_path.iterdir()] == ["set.zip"]
    assert (tmp_path / "set.zip").read_bytes() == b"the old set"


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "MOST_UNPACKED_BYTES", 1000)
    path = tmp_path / "t-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"\x00\x00\x08\x03" + struct.pack(">3I", 100, 4, 4) + bytes(1600)))
    with pytest.raises(ValueError, match=r"images-idx3-ubyte\.gz: unpacks to more than"):
        open_images(path)
