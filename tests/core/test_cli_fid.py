"""`neon fid`: any number of ranks, parts or resumptions gives the same statistics."""

import gzip
import itertools
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from fid import fashion
from fid.features import Features
from fid.frechet import frechet_distance
from fid.partial import read_partial
from fid.reference import read_reference
from neon.cli.main import main
from neon.images.formats import open_images
from neon.store import records
from tests.commands import ROOT, last_object, start, started
from tests.core.line_family import Pixels

EXACT = ("--extractor", "tests.core.line_family:open_pixels")
NETWORK = ("--extractor", "fashion-cnn")


def neon(*arguments: object) -> dict:
    done = CliRunner().invoke(main, ["fid", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return last_object(done.stdout)


def refused(*arguments: object) -> str:
    done = CliRunner().invoke(main, ["fid", *map(str, arguments)])
    assert done.exit_code == 1
    return done.output


@pytest.fixture
def tiny(tmp_path) -> Path:
    """101 images of 4 x 4 pixels, for the extractor that computes nothing."""
    pixels = np.random.default_rng(0).integers(0, 256, (101, 1, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "tiny.npz", images=pixels)
    return tmp_path / "tiny.npz"


@pytest.fixture
def clothes(tmp_path) -> Path:
    """101 real images, for a real network."""
    np.savez(tmp_path / "clothes.npz", images=open_images(ROOT / "demo/fashion_base.npz").read(range(101)).numpy())
    return tmp_path / "clothes.npz"


def assert_same_statistics(a: Path, b: Path, relative: float) -> None:
    one, two = read_reference(a), read_reference(b)
    assert one.count == two.count
    for x, y in ((one.mean, two.mean), (one.covariance, two.covariance)):
        assert (x - y).abs().max() <= relative * x.abs().max()


@pytest.mark.parametrize(
    ("ranks", "images", "extractor", "relative"), [(3, "tiny", EXACT, 1e-10), (2, "clothes", NETWORK, 1e-5)]
)
def test_statistics_of_any_number_of_ranks(request, tmp_path, ranks, images, extractor, relative):
    source = request.getfixturevalue(images)
    neon("ref", "--data", source, "--out", tmp_path / "one.npz", "--batch", 7, "--device", "cpu", *extractor)
    options = ("--data", source, "--out", tmp_path / "more.npz", "--batch", 16, "--device", "cpu")
    assert started("-m", "neon", "fid", "ref", *options, *extractor, ranks=ranks)["sha256"]
    assert read_reference(tmp_path / "more.npz").count == 101
    assert_same_statistics(tmp_path / "one.npz", tmp_path / "more.npz", relative)


def test_metrics_of_two_ranks(tmp_path, tiny):
    neon("ref", "--data", tiny, "--out", tmp_path / "ref.npz", *EXACT)
    arguments = ["--data", tiny, "--ref", tmp_path / "ref.npz", "--ref-data", tiny, *EXACT]
    for metric in ("fid", "fid_inf", "precision", "coverage"):
        arguments += ["--metric", metric]
    alone = neon("calc", *arguments)
    together = started("-m", "neon", "fid", "calc", *arguments, "--device", "cpu", ranks=2)
    assert together["metrics"] == pytest.approx(alone["metrics"], rel=1e-10, abs=1e-8)
    assert alone["comparable"] is False
    assert alone["num_images"] == 101
    assert {"seconds", "images_per_second", "reference_sha256", "extractor_sha256", "source_sha256", "versions"} <= set(
        alone
    )


def test_a_reference_of_another_extractor_is_an_error_before_any_image_is_read(clothes, tmp_path, monkeypatch):
    """Exited 0 with 1402.09; the extractor's own reference gives the same value as ever."""
    own = neon("calc", "--data", clothes, "--ref", ROOT / "demo/reference_fashion-cnn.npz", *NETWORK)
    assert own["metrics"]["fd101[fashion-cnn]"] > 0
    monkeypatch.setattr("neon.evaluation.compute.pass_over", lambda *_: pytest.fail("images were read"))
    other = ROOT / "demo/reference_pixel-pca64.npz"
    message = refused("calc", "--data", clothes, "--ref", other, *NETWORK)
    assert "holds features of pixel-pca64, the images get those of fashion-cnn" in message


def test_statistics_of_unknown_weights_are_not_compared_with_the_shipped_one_s(clothes, tmp_path):
    tensors = load_file(fashion.WEIGHTS)
    save_file({**tensors, "hidden.bias": tensors["hidden.bias"] + 1}, tmp_path / "w.safetensors")
    unknown = ("--inception", tmp_path / "w.safetensors", "--allow-unknown-weights")
    neon("ref", "--data", clothes, "--out", tmp_path / "a.npz", *NETWORK)
    made = neon("ref", "--data", clothes, "--out", tmp_path / "b.npz", *NETWORK, *unknown)
    assert made["extractor"].startswith("fashion-cnn-unknown-")
    assert "their distance means nothing" in refused("compare", tmp_path / "a.npz", tmp_path / "b.npz")
    assert neon("compare", tmp_path / "b.npz", tmp_path / "b.npz")["frechet_distance"] < 1e-6


@pytest.mark.parametrize(
    ("command", "ending"),
    [
        (("fid", "ref", "--data", "tiny.npz"), ".npz"),
        (("fid", "part", "--data", "tiny.npz", "--images", "0:9"), ".safetensors"),
        (("fid", "merge", "a.safetensors"), ".npz"),
        (("fid", "convert", "a.pkl"), ".npz"),
        (("diff", "a.safetensors", "b.safetensors"), ".png"),
        (("data", "tiny.npz"), ".zip"),
    ],
)
def test_a_name_without_its_ending_is_refused_before_any_work(tmp_path, monkeypatch, command, ending):
    """The commands that read such a file go by its name."""
    monkeypatch.chdir(tmp_path)
    for name in ("out", f"out{ending}.bak"):
        done = CliRunner().invoke(main, [*command, "--out", name])
        assert done.exit_code == 2
        assert f"Invalid value for '--out': {name}: expected a name ending in {ending}" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["ref", "calc"])
def test_a_killed_pass_goes_on_and_ends_with_the_same_bits(tmp_path, tiny, monkeypatch, command):
    neon("ref", "--data", tiny, "--out", tmp_path / "whole.npz", "--batch", 10, *EXACT)
    extra = (
        ("--out", tmp_path / "out.npz")
        if command == "ref"
        else ("--ref", tmp_path / "whole.npz", "--metric", "fid", "--metric", "fid_inf")
    )
    arguments = (command, "--data", tiny, "--batch", 10, "--resume", tmp_path / "sums", *extra, *EXACT)
    monkeypatch.setattr(records.Saver, "is_due", True)
    extract, calls = Pixels.extract, []

    def dies_at_the_seventh(self, images):
        calls.append(len(images))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return extract(self, images)

    monkeypatch.setattr(Pixels, "extract", dies_at_the_seventh)
    CliRunner().invoke(main, ["fid", *map(str, arguments)])
    assert len(calls) == 7
    result = neon(*arguments)
    assert sum(calls[7:]) == (101 - 60 if command == "ref" else 1 + 101 - 50)  # calc tries one image first
    if command == "ref":
        assert_same_statistics(tmp_path / "whole.npz", tmp_path / "out.npz", 0.0)
    else:
        again = neon(*arguments)["metrics"]
        assert again == result["metrics"]
        assert sum(calls[-11:]) == 101  # nothing of the finished pass is left to go on from
    assert not list((tmp_path / "sums").iterdir())


@pytest.mark.parametrize(
    ("images", "batch", "is_other"), [("20:80", 10, False), ("0:60", 9, False), ("0:60", 10, True)]
)
def test_sums_of_another_pass_are_not_gone_on_with(tmp_path, tiny, monkeypatch, images, batch, is_other):
    monkeypatch.setattr(records.Saver, "is_due", True)
    extract, calls = Pixels.extract, []

    def dies_at_the_fourth(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return extract(self, pixels)

    monkeypatch.setattr(Pixels, "extract", dies_at_the_fourth)
    sums = ("--resume", tmp_path / "sums")
    killed = (
        "part",
        "--data",
        tiny,
        "--images",
        "0:60",
        "--batch",
        10,
        "--out",
        tmp_path / "killed.safetensors",
        *sums,
        *EXACT,
    )
    CliRunner().invoke(main, ["fid", *map(str, killed)])
    assert len(calls) == 4
    if is_other:
        np.savez(tiny, images=255 - np.load(tiny)["images"])
    asked = ("part", "--data", tiny, "--images", images, "--batch", batch, *EXACT)
    neon(*asked, "--out", tmp_path / "resumed.safetensors", *sums)
    neon(*asked, "--out", tmp_path / "fresh.safetensors")
    resumed, fresh = (read_partial(tmp_path / f"{name}.safetensors").moments.tensors() for name in ("resumed", "fresh"))
    assert all(torch.equal(resumed[name], fresh[name]) for name in fresh)


def write_folder(folder: Path, pixels: np.ndarray) -> Path:
    """Images of one size without compression: whatever they show, their files have the same names and sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image[0]).save(folder / f"{i:03d}.bmp")
    return folder


def test_images_made_anew_under_the_same_names_are_another_set(tmp_path, tiny, monkeypatch):
    """The killed pass's sums over the old images were mixed with the new ones: FD 1006 to the truth."""
    monkeypatch.setattr(records.Saver, "is_due", True)
    pixels = np.load(tiny)["images"]
    folder = write_folder(tmp_path / "set", pixels)
    asked = ("ref", "--data", folder, "--batch", 10, *EXACT)
    kill_at(monkeypatch, 4, *asked, "--out", tmp_path / "killed.npz", "--resume", tmp_path / "sums")
    assert list((tmp_path / "sums").iterdir())
    write_folder(folder, 255 - pixels)
    neon(*asked, "--out", tmp_path / "resumed.npz", "--resume", tmp_path / "sums")
    neon(*asked, "--out", tmp_path / "fresh.npz")
    assert_same_statistics(tmp_path / "resumed.npz", tmp_path / "fresh.npz", 0.0)


def kill_at(monkeypatch, call: int, *arguments: object) -> None:
    """Run `neon fid ...` and end it at the extractor's n-th batch."""
    calls: list[int] = []

    def dies(self: Pixels, pixels: torch.Tensor) -> Features:
        calls.append(len(pixels))
        if len(calls) == call:
            raise KeyboardInterrupt
        return extract(self, pixels)

    extract = Pixels.extract
    with monkeypatch.context() as patch:
        patch.setattr(Pixels, "extract", dies)
        CliRunner().invoke(main, ["fid", *map(str, arguments)])
    assert len(calls) == call


def test_a_moved_and_renamed_set_is_the_same_set(tmp_path, tiny):
    """Content decides: parts made on two machines, under other names, add up."""
    folder = write_folder(tmp_path / "here/samples", np.load(tiny)["images"])
    zips = [tmp_path / "a.zip", tmp_path / "b.zip"]
    for path in zips:
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, file.name)
    shutil.copytree(folder, tmp_path / "there/renamed")
    for name, (one, two) in {"zip": zips, "folder": (folder, tmp_path / "there/renamed")}.items():
        parts = [tmp_path / f"{name}-{i}.safetensors" for i in (0, 1)]
        neon("part", "--data", one, "--images", "0:50", "--out", parts[0], *EXACT)
        neon("part", "--data", two, "--images", "50:101", "--out", parts[1], *EXACT)
        assert neon("merge", *parts, "--out", tmp_path / f"{name}.npz")["num_images"] == 101
        message = refused("merge", parts[1], "--out", tmp_path / "x.npz")
        assert "the images 0 to 50 (the last excluded) of 101 are in none of the parts" in message


METRICS = ("fid", "fid_inf", "kid_unbiased", "precision", "recall")


def asked_metrics(tiny: Path, reference: Path) -> tuple[object, ...]:
    options: tuple[object, ...] = ("calc", "--data", tiny, "--ref", reference, "--ref-data", tiny, "--batch", 10)
    return (*options, *(word for metric in METRICS for word in ("--metric", metric)), *EXACT)


def test_a_pass_killed_at_every_removal_ends_with_the_same_values(tmp_path, tiny, monkeypatch):
    """The features were removed before the state that counts them: zeros took their place (kid1k 2155 for 29.9)."""
    monkeypatch.setattr(records.Saver, "is_due", True)
    neon("ref", "--data", tiny, "--out", tmp_path / "ref.npz", *EXACT)
    asked = asked_metrics(tiny, tmp_path / "ref.npz")
    expected, sums = neon(*asked)["metrics"], tmp_path / "sums"
    for number in itertools.count(1):
        removed: list[str] = []

        def dies(name: str, removed=removed, number=number) -> Callable[..., None]:
            def remove(path: str, *rest: object, **options: object) -> None:
                removed.append(str(path))
                if len(removed) == number:
                    raise KeyboardInterrupt
                original(path, *rest, **options)

            original = getattr(os, name)
            return remove

        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir", "remove"):
                patch.setattr(os, name, dies(name))
            CliRunner().invoke(main, ["fid", *map(str, (*asked, "--resume", sums))])
        assert neon(*asked, "--resume", sums)["metrics"] == expected, f"killed at removal {number}: {removed[-1]}"
        if len(removed) < number:
            break
    assert number > 6


@pytest.mark.parametrize("damage", ["gone", "short", "flipped", "state"])
def test_lost_features_begin_the_pass_again(tmp_path, tiny, monkeypatch, caplog, damage):
    monkeypatch.setattr(records.Saver, "is_due", True)
    neon("ref", "--data", tiny, "--out", tmp_path / "ref.npz", *EXACT)
    asked = asked_metrics(tiny, tmp_path / "ref.npz")
    expected = neon(*asked)["metrics"]
    kill_at(monkeypatch, 17, *asked, "--resume", tmp_path / "sums")
    (features,) = (tmp_path / "sums").glob("*/*/features-0/features.f32")
    if damage == "gone":
        features.unlink()
    elif damage == "short":
        features.write_bytes(features.read_bytes()[:1000])
    elif damage == "flipped":
        features.write_bytes(bytes([features.read_bytes()[0] ^ 1]) + features.read_bytes()[1:])
    else:
        state = features.parents[1] / "state.pt"
        state.write_bytes(state.read_bytes()[:-100])
    assert neon(*asked, "--resume", tmp_path / "sums")["metrics"] == expected
    assert "This pass begins again" in caplog.text


def test_unusable_files_of_all_ranks_are_named_once(tmp_path, tiny):
    folder = write_folder(tmp_path / "set", np.load(tiny)["images"])
    bad = [f"{i:03d}.bmp" for i in (0, 30, 31, 90)]
    for name in bad:
        (folder / name).write_bytes(b"not an image")
    asked = ("ref", "--data", folder, "--out", tmp_path / "ref.npz", "--batch", 10, "--device", "cpu", *EXACT)
    done = start("-m", "neon", "fid", *asked, ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("4 image file(s) cannot be used") == 1
    assert all(done.stderr.count(name) == 1 for name in bad[:3])


def open_told(*, path, device, allow_unknown_weights):
    raise ValueError(f"told {path} and {allow_unknown_weights}")


def test_what_is_said_about_weights_reaches_the_extractor(tmp_path, tiny):
    told = ("ref", "--data", tiny, "--out", tmp_path / "ref.npz", "--extractor", "tests.core.test_cli_fid:open_told")
    assert "told None and False" in refused(*told)
    assert "told w.pth and True" in refused(*told, "--inception", "w.pth", "--allow-unknown-weights")


def test_parts_of_several_machines_add_up_to_the_whole(tmp_path, tiny):
    neon("ref", "--data", tiny, "--out", tmp_path / "whole.npz", *EXACT)
    parts = []
    for first, stop in ((0, 40), (70, 101), (40, 70)):
        parts.append(tmp_path / f"{first}.safetensors")
        neon("part", "--data", tiny, "--images", f"{first}:{stop}", "--out", parts[-1], "--batch", 9, *EXACT)
    (tmp_path / "other").mkdir()
    merged = neon("merge", *parts, "--out", tmp_path / "merged.npz")
    assert merged["num_images"] == 101
    assert_same_statistics(tmp_path / "whole.npz", tmp_path / "merged.npz", 1e-10)
    assert (
        abs(
            frechet_distance(
                generated=read_reference(tmp_path / "merged.npz"), reference=read_reference(tmp_path / "whole.npz")
            )
        )
        < 1e-6
    )
    assert "the images 40 to 70 " in refused("merge", *parts[:2], "--out", tmp_path / "gap.npz")
    np.savez(
        tmp_path / "other" / "tiny.npz", images=255 - np.load(tiny)["images"]
    )  # another set of the same name, size and count
    other = (
        "part",
        "--data",
        tmp_path / "other/tiny.npz",
        "--images",
        "40:70",
        "--out",
        tmp_path / "other.safetensors",
        *EXACT,
    )
    neon(*other)
    assert "the parts differ in source" in refused(
        "merge", *parts[:2], tmp_path / "other.safetensors", "--out", tmp_path / "mixed.npz"
    )
    assert "in two of the parts" in refused("merge", *parts, parts[0], "--out", tmp_path / "twice.npz")
    assert not (tmp_path / "gap.npz").exists()
    assert "holds the images 0 to 101" in refused(
        "part", "--data", tiny, "--images", "90:102", "--out", tmp_path / "x.safetensors", *EXACT
    )
    assert "expected START:STOP" in refused(
        "part", "--data", tiny, "--images", "90", "--out", tmp_path / "x.safetensors", *EXACT
    )


def write_fashion_mnist(root: Path, images: torch.Tensor) -> None:
    """The files that torchvision.datasets.FashionMNIST looks for."""
    raw = root / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        pixels = struct.pack(">IIII", 2051, len(images), 28, 28) + images.numpy().tobytes()
        labels = struct.pack(">II", 2049, len(images)) + bytes(i % 10 for i in range(len(images)))
        for name, data in ((f"{split}-images-idx3-ubyte", pixels), (f"{split}-labels-idx1-ubyte", labels)):
            (raw / name).write_bytes(data)
            (raw / f"{name}.gz").write_bytes(gzip.compress(data))


def test_torchvision_s_datasets_are_image_sets(tmp_path, clothes):
    expected = open_images(clothes).read(range(101))
    write_fashion_mnist(tmp_path, expected[:, 0])
    found = open_images(f"torchvision:FashionMNIST:test:{tmp_path}")
    assert torch.equal(found.read(range(101)), expected)
    assert found.labels.tolist() == [i % 10 for i in range(101)]
    spec = f"torchvision:FashionMNIST:train:{tmp_path}"
    neon("ref", "--data", spec, "--out", tmp_path / "a.npz", *NETWORK)
    neon("ref", "--data", clothes, "--out", tmp_path / "b.npz", *NETWORK)
    assert_same_statistics(tmp_path / "a.npz", tmp_path / "b.npz", 0.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:FashionMNIST", "expected torchvision:NAME:SPLIT:FOLDER"),
        ("torchvision:Nothing:train:/x", "no dataset 'Nothing'"),
        ("torchvision:FashionMNIST:all:/x", "splits train and test, got 'all'"),
        ("torchvision:FashionMNIST:train:/nowhere", "not found"),
    ],
)
def test_a_torchvision_set_that_is_not_there(tmp_path, spec, message):
    assert message in refused("ref", "--data", spec, "--out", tmp_path / "ref.npz", *NETWORK)
