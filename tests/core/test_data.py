"""Image sets: every format gives the same images; what cannot be used is named and counted."""

import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from neon.cli.main import main
from neon.images.formats import open_images, write_zip
from neon.images.image_set import UnreadableImagesError


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


def save_folder(folder, pixels, names=None):
    for i, image in enumerate(pixels):
        path = folder / (names[i] if names else f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def test_every_format_gives_the_same_images(tmp_path, pixels):
    expected = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    folder = save_folder(tmp_path / "folder", pixels)
    np.savez(tmp_path / "nhwc.npz", arr_0=pixels, arr_1=np.arange(7))
    np.savez(tmp_path / "nchw.npz", images=np.ascontiguousarray(expected.numpy()), labels=np.arange(7))
    write_zip(tmp_path / "set.zip", open_images(folder).batches(2), torch.arange(7))
    for path in (folder, tmp_path / "nhwc.npz", tmp_path / "nchw.npz", tmp_path / "set.zip"):
        images = open_images(path)
        assert images.shape == (3, 6, 5)
        assert torch.equal(torch.cat(list(images.batches(3))), expected), path
        assert torch.equal(images.read([6, 0]), expected[[6, 0]])
        if path != folder:
            assert images.labels.tolist() == list(range(7))
            assert open_images(path, use_labels=False).labels is None


def test_idx_with_its_labels(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (4, 3, 2), dtype=np.uint8)
    header = b"\x00\x00\x08"
    (tmp_path / "train-images-idx3-ubyte").write_bytes(
        header + b"\x03" + struct.pack(">3I", 4, 3, 2) + images.tobytes()
    )
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(header + b"\x01" + struct.pack(">I", 4) + bytes([3, 1, 2, 0]))
    found = open_images(tmp_path / "train-images-idx3-ubyte")
    assert torch.equal(found.read(range(4))[:, 0], torch.from_numpy(images))
    assert found.labels.tolist() == [3, 1, 2, 0]
    (tmp_path / "cut-images-idx3-ubyte").write_bytes(header + b"\x03" + struct.pack(">3I", 4, 3, 2) + b"abc")
    with pytest.raises(ValueError, match=r"announces \(4, 3, 2\), the file holds 3 bytes"):
        open_images(tmp_path / "cut-images-idx3-ubyte")


def test_class_folders_and_dataset_json(tmp_path, pixels):
    folder = save_folder(tmp_path / "set", pixels[:3], ["cat/1.png", "ant/2.png", "cat/3.png"])
    images = open_images(folder)
    assert list(images.names) == ["ant/2.png", "cat/1.png", "cat/3.png"]
    assert images.labels.tolist() == [0, 1, 1]
    (folder / "dataset.json").write_text(json.dumps({"labels": [["cat/1.png", 5], ["ant/2.png", 6], ["cat/3.png", 7]]}))
    assert open_images(folder).labels.tolist() == [6, 5, 7]
    (folder / "dataset.json").write_text(json.dumps({"labels": [["cat/1.png", 5]]}))
    with pytest.raises(ValueError, match=r"no label for 2 of 3 images, first: ant/2\.png"):
        open_images(folder)


def test_pad(tmp_path, pixels):
    folder = save_folder(tmp_path / "set", pixels)
    plain = open_images(folder)
    padded = open_images(folder, pad=2)
    assert padded.shape == (3, 10, 9)
    assert torch.equal(padded.read([0])[..., 2:-2, 2:-2], plain.read([0]))
    assert padded.read([0])[..., :2, :].sum() == 0


def test_unusable_files_are_named_and_counted(tmp_path, pixels):
    folder = save_folder(tmp_path / "set", pixels)
    (folder / "001.png").write_bytes(b"not an image")
    Image.fromarray(pixels[0]).convert("RGBA").save(folder / "002.png")
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(folder / "003.png")
    Image.fromarray(pixels[0][:4]).save(folder / "004.png")
    with pytest.raises(UnreadableImagesError, match=r"4 image file\(s\) cannot be used") as error:
        list(open_images(folder).batches(2))
    text = " ".join(error.value.problems)
    for reason in (
        "001.png: cannot be decoded",
        "002.png: is of mode RGBA (an alpha channel)",
        "003.png",
        "004.png: size (3, 4, 5) uint8 differs",
    ):
        assert reason in text


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image set at"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"no images found; looked for \*\.png.* in 1 file"):
        open_images(tmp_path / "empty")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="found mu"):
        open_images(tmp_path / "other.npz")
    (tmp_path / "fake.zip").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="a web page"):
        open_images(tmp_path / "fake.zip")


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "labels.npz", images=np.zeros((1, 4, 4), np.uint8), labels=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        open_images(tmp_path / "labels.npz")
    np.savez(tmp_path / "evil.npz", images=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="found object"):
        open_images(tmp_path / "evil.npz")


def test_zip_layout_is_nvidias(tmp_path, pixels):
    count = write_zip(tmp_path / "a.zip", iter([torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())]), None)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert count == 7
        assert archive.namelist()[0] == "00000/img00000000.png"
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


def test_files_of_many_sizes_and_modes_are_cropped_to_one(tmp_path):
    """A grey ramp keeps its middle; what Pillow itself cuts out of the scaled image is what we read."""
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None, :] * 4, (32, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")  # 64 wide, 32 high: scaled by 1/2, then 8 columns off either side
    colour = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "b.png")
    with pytest.raises(UnreadableImagesError, match=r"differs from a\.png's"):
        list(open_images(tmp_path).batches(2))
    images = open_images(tmp_path, size=16)
    assert images.shape == (3, 16, 16)
    found = torch.cat(list(images.batches(2)))
    columns = (ramp[0, 0::2].astype(int) + ramp[0, 1::2])[8:24] / 2
    assert (found[0].double() - torch.from_numpy(columns)).abs().max() <= 1
    assert torch.equal(found[1], torch.from_numpy(colour.transpose(2, 0, 1)))
    np.savez(tmp_path / "set.npz", images=colour[None])
    with pytest.raises(ValueError, match="only image files"):
        open_images(tmp_path / "set.npz", size=8)


def made(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["data", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_a_training_set_says_what_was_counted_and_where_labels_came_from(tmp_path, pixels):
    names = [f"{label}/{i}.png" for i, label in enumerate((0, 1, 2, 3, 4, 10, 11))]
    folder = save_folder(tmp_path / "set", pixels, names)
    Image.fromarray(pixels[0]).save(folder / "2/photo.jpg")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints/0-checkpoint.png").write_bytes(b"x")
    code, stdout, stderr = made(folder, "--out", tmp_path / "out.ZIP")
    result = json.loads(stdout)
    assert (code, result["num_images"], result["num_classes"]) == (0, 8, 7)
    assert result["labels_from"] == "7 class folders, in this order: 0, 1, 2, 3, 4, 10, 11"
    assert [note.partition(",")[0] for note in result["cautions"]] == [
        "1 file(s) are hidden and not counted",
        "1 file(s) are of a lossy format (JPEG): its artefacts change a distance",
    ]
    assert all(note in stderr for note in result["cautions"])
    written = open_images(tmp_path / "out.ZIP")
    source = open_images(folder)
    assert written.labels.tolist() == source.labels.tolist() == [0, 1, 5, 6, 2, 2, 3, 4]
    assert torch.equal(written.read(range(8)), source.read(range(8)))


def test_a_failed_training_set_leaves_nothing_and_says_why(tmp_path, pixels):
    folder = save_folder(tmp_path / "set", pixels[:3], ["ant/1.png", "bee/2.png", "stray.png"])
    code, stdout, stderr = made(folder, "--out", tmp_path / "out.zip")
    assert (code, stdout) == (1, "")
    assert "1 of 3 images lie outside the class folders, first: stray.png" in stderr
    assert made(folder, "--out", tmp_path / "out.zip", "--no-labels")[0] == 0
    (tmp_path / "out.zip").unlink()
    (folder / "bee/2.png").write_bytes(b"x")
    code, _, stderr = made(folder, "--out", tmp_path / "out.zip", "--no-labels")
    assert (code, len(stderr.splitlines())) == (1, 1)
    assert "bee/2.png: cannot be decoded" in stderr
    assert [file.name for file in tmp_path.iterdir()] == ["set"]
