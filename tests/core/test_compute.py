"""Images against images or statistics: every kind of side gives the same numbers; what cannot work is said first."""

import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fid.features import open_extractor
from fid.frechet import Gaussian, frechet_distance
from fid.metrics import kernel_distance
from fid.precision_recall import precision_recall
from neon.cli.main import main
from neon.evaluation.compute import compute
from neon.images.formats import open_images
from neon.runtime.distributed import _device
from tests.commands import ROOT, last_object
from tests.core.line_family import Pixels, open_pixels

PIXELS = "tests.core.line_family:open_pixels"
RANDOM = np.random.default_rng(0)
MADE, REAL = RANDOM.integers(0, 256, (120, 1, 4, 4), np.uint8), RANDOM.integers(0, 200, (150, 1, 4, 4), np.uint8)


def features(images: np.ndarray) -> torch.Tensor:
    return Pixels()(torch.from_numpy(images)).pool


def gaussian(images: np.ndarray) -> Gaussian:
    x = features(images).double()
    return Gaussian(x.mean(0), torch.cov(x.T), len(x))


def save(folder, pixels):
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image[0]).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def sides(tmp_path):
    """The same generated and reference images in every form."""
    forms: dict[str, list] = {}
    for name, images in (("made", MADE), ("real", REAL)):
        folder = save(tmp_path / name, images)
        with zipfile.ZipFile(tmp_path / f"{name}.ZIP", "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, f"top/{file.name}")
        np.savez(tmp_path / f"{name}.npz", arr_0=images.transpose(0, 2, 3, 1))
        np.savez_compressed(tmp_path / f"{name}-small.npz", images=images)
        np.save(tmp_path / f"{name}.npy", images[:, 0])
        paths = [folder, *(tmp_path / (name + end) for end in (".ZIP", ".npz", "-small.npz", ".npy"))]
        for form in (*paths, str(folder), images, torch.from_numpy(images), open_images(folder)):
            forms.setdefault(name, []).append(form)
    return list(zip(forms["made"], forms["real"], strict=True))


def test_every_kind_of_side_gives_the_plain_functions_values(sides):
    near = precision_recall(generated=features(MADE), reference=features(REAL), k=3)
    for generated, reference in sides:
        found = compute(
            generated, reference, metrics=("fid", "precision", "recall"), extractor=PIXELS, batch=7, device="cpu"
        )
        assert found.metrics == pytest.approx(
            {
                f"fd120[{PIXELS}]": frechet_distance(generated=gaussian(MADE), reference=gaussian(REAL)),
                f"precision120[{PIXELS},k=3]": near.precision,
                f"recall120[{PIXELS},k=3]": near.recall,
            },
            rel=1e-9,
        ), generated
        assert (found.num_images, found.cautions) == (120, [])


def test_an_extractor_of_one_s_own_and_a_smaller_kid(sides):
    network = open_pixels(path=None, device="cpu", allow_unknown_weights=False)
    network.name = "mine"
    found = compute(*sides[0], metrics=("kid",), extractor=network, kid_subset=50, device="cpu").metrics
    expected = kernel_distance(generated=features(MADE), reference=features(REAL), subset_size=50)
    assert found["kid120[mine,subset=50]"] == pytest.approx(expected.mean, rel=1e-9)
    assert set(found) == {"kid120[mine,subset=50]", "kid_std120[mine,subset=50]", "kid_unbiased120[mine]"}


def calc(*arguments):
    done = CliRunner().invoke(main, ["fid", "calc", *map(str, arguments), "--extractor", PIXELS, "--device", "cpu"])
    return done


def test_statistics_and_their_images_are_the_same_reference(tmp_path, sides):
    made, real = sides[0]
    ref = ("fid", "ref", "--data", real, "--out", tmp_path / "new/ref.npz", "--extractor", PIXELS, "--device", "cpu")
    CliRunner().invoke(main, list(map(str, ref)), catch_exceptions=False)
    a, b = (
        last_object(calc("--data", made, "--ref", reference).stdout) for reference in (real, tmp_path / "new/ref.npz")
    )
    assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-9)
    assert (a["reference_sha256"], a["cautions"]) == (None, [])
    assert len(b["reference_sha256"]) == 64
    other = calc(
        "--data", made, "--ref", tmp_path / "new/ref.npz", "--ref-data", made, "--metric", "fid", "--metric", "recall"
    )
    assert "--ref and --ref-data are different sets" in " ".join(last_object(other.stdout)["cautions"])
    same = calc(
        "--data", made, "--ref", tmp_path / "new/ref.npz", "--ref-data", real, "--metric", "fid", "--metric", "recall"
    )
    assert last_object(same.stdout)["cautions"] == []


def test_statistics_may_be_called_like_an_idx_file(tmp_path):
    about = gaussian(REAL)
    np.savez(tmp_path / "my_idx_ref.npz", mu=about.mean.numpy(), sigma=about.covariance.numpy())
    found = compute(MADE, tmp_path / "my_idx_ref.npz", extractor=PIXELS).metrics
    (value,) = found.values()
    assert value == pytest.approx(frechet_distance(generated=gaussian(MADE), reference=about), rel=1e-9)


def test_a_reference_of_another_shape_is_said(tmp_path):
    """The same feature network takes images of any size: a comparison across resolutions looks like any other."""
    from tests.quarters_extractor import Quarters

    found = compute(MADE, np.zeros((150, 8, 8), np.uint8) + REAL[:, 0, :1, :1], extractor=Quarters(), device="cpu")
    assert found.cautions[0] == (
        "the images are [1, 4, 4] (channels, height, width), those of the reference set [1, 8, 8]"
    )


def test_references_of_few_images_and_dark_images_are_said(tmp_path):
    few = compute(MADE, REAL[:16], extractor=PIXELS, device="cpu")
    assert "the reference is made of 16 images for 16 features" in few.cautions[0]
    dark = compute(np.concatenate([MADE[:50], MADE[50:] // 128]), REAL, extractor=PIXELS, device="cpu")
    assert dark.cautions == [
        "70 file(s) hold no value above 1 (black, or numbers in [0, 1] under the type uint8?), first: 00000050"
    ]


def test_an_inception_score_of_few_images_is_refused_before_the_pass(monkeypatch):
    monkeypatch.setattr("neon.evaluation.compute.pass_over", lambda *_: pytest.fail("images were read"))
    clothes = open_images(ROOT / "demo/fashion_base.npz").subset(range(40))
    with pytest.raises(ValueError, match="needs at least 50 images"):
        compute(clothes, metrics=("is",), extractor="fashion-cnn", device="cpu")


def test_the_inception_score_needs_no_reference():
    clothes = open_images(ROOT / "demo/fashion_base.npz").subset(range(50))
    found = compute(clothes, metrics=("is",), extractor="fashion-cnn", device="cpu")
    assert 1 < found.metrics["is50[fashion-cnn]"] < 10


def test_a_reference_of_another_extractor_is_said_before_weights_are_asked_for(tmp_path, monkeypatch):
    """Without --extractor the answer was where to download the FID Inception, which this reference has no use for."""
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    np.save(tmp_path / "data.npy", MADE[:, 0])
    asked = ["fid", "calc", "--data", tmp_path / "data.npy", "--ref", ROOT / "demo/reference_fashion-cnn.npz"]
    said = CliRunner().invoke(main, list(map(str, asked))).output
    assert "holds features of fashion-cnn, the images get those of inception-2015-12-05" in said
    assert "with --extractor" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "fid needs a reference (--ref)"),
        (("--metric", "kid", "--ref", "STATS"), "kid compares with every reference image"),
        (("--metric", "recall", "--ref", "STATS"), "recall compares with every reference image"),
        (("--metric", "kid", "--ref", "REAL"), "KID over subsets of 1000 needs that many images in both sets, got 120"),
        (("--metric", "coverage", "--k", "120", "--ref", "REAL"), "k = 120 neighbours need at least 121 images"),
        (("--metric", "is"), "has no classes: it gives no Inception Score"),
        (("--metric", "fid_inf", "--ref", "STATS", "--data", "FEW"), "extrapolation with 10 groups needs more than 8"),
        (("--ref", "SIX"), "another extractor made it"),
        (("--ref", "NOTHING"), "expected the arrays mu and sigma, found x"),
        (("--ref", "GONE"), "GONE"),
        (("--ref", "STATS", "--ref-data", "GONE"), "GONE"),
        (("--ref", "LARGE"), "LARGE.npy: "),
        (("--ref", "STATS", "--data", "FLOATS"), "expected uint8 images"),
        (("--ref", "STATS", "--device", "foo"), "--device foo: no such device"),
        (("--ref", "STATS", "--device", "meta"), "nothing here runs on meta"),
    ],
)
def test_what_cannot_work_is_said_before_the_pass(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("neon.evaluation.compute.pass_over", lambda *_: pytest.fail("images were read"))
    np.save(tmp_path / "DATA.npy", MADE[:, 0])
    np.save(tmp_path / "REAL.npy", REAL[:, 0])
    np.save(tmp_path / "FEW.npy", MADE[:8, 0])
    np.save(tmp_path / "LARGE.npy", np.zeros((150, 9, 9), np.uint8))
    np.save(tmp_path / "FLOATS.npy", MADE[:, 0] / 255)
    np.savez(tmp_path / "STATS.npz", mu=np.zeros(16), sigma=np.eye(16))
    np.savez(tmp_path / "SIX.npz", mu=np.zeros(6), sigma=np.eye(6))
    np.savez(tmp_path / "NOTHING.npz", x=np.zeros(6))
    files = {file.stem: file for file in tmp_path.iterdir()} | {"GONE": tmp_path / "GONE"}
    asked = {"--data": tmp_path / "DATA.npy", "--device": "cpu"}
    rest = []
    for option, value in zip(options[::2], options[1::2], strict=True):
        if option in asked:
            asked[option] = files.get(value, value)
        else:
            rest += [option, files.get(value, value)]
    words = [*rest, *(word for pair in asked.items() for word in pair), "--extractor", PIXELS]
    done = CliRunner().invoke(main, ["fid", "calc", *map(str, words)])
    assert done.exit_code == 1
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["ref", "part"])
def test_an_output_that_cannot_be_written_is_said_before_the_pass(tmp_path, monkeypatch, command):
    monkeypatch.setattr("neon.evaluation.on_disk.pass_over", lambda *_: pytest.fail("images were read"))
    np.save(tmp_path / "data.npy", MADE[:, 0])
    (tmp_path / "file").write_text("x")
    ending, extra = (".npz", ()) if command == "ref" else (".safetensors", ("--images", "0:9"))
    (tmp_path / f"folder{ending}").mkdir()
    reasons = {"folder": "it is a folder", "file/below": "file is a file, not a folder", "file/a/b": "not a folder"}
    for name, reason in reasons.items():
        out = tmp_path / f"{name}{ending}"
        words = ("fid", command, "--data", tmp_path / "data.npy", "--out", out, *extra, "--extractor", PIXELS)
        done = CliRunner().invoke(main, list(map(str, words)))
        assert done.exit_code == 1
        assert f"cannot write {out}: " in done.output
        assert reason in done.output
    words = (*words[:5], tmp_path / f"out{ending}", *words[6:], "--resume", tmp_path / "file")
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 2
    assert "file' is a file" in done.output


@pytest.mark.parametrize(
    ("command", "outs"),
    [
        (("fid", "ref"), ["link.npz"]),
        (("fid", "part", "--images", "0:9"), ["link.safetensors"]),
        (("data",), ["set.zip", "link.zip"]),
    ],
)
def test_the_set_that_is_read_is_not_replaced(tmp_path, command, outs):
    save(tmp_path / "set", MADE[:9])
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted((tmp_path / "set").iterdir()):
            archive.write(file, file.name)
    for link in {*outs} - {"set.zip"}:
        (tmp_path / link).symlink_to(tmp_path / "set.zip")
    before = (tmp_path / "set.zip").read_bytes()
    for out in outs:
        source = () if command == ("data",) else ("--data",)
        words = (*command, *source, tmp_path / "set.zip", "--out", tmp_path / out)
        done = CliRunner().invoke(main, list(map(str, words)))
        assert done.exit_code == 1
        assert "is the same file as the input" in done.output
        assert (tmp_path / "set.zip").read_bytes() == before


@pytest.mark.parametrize(("said", "meant"), [("0", "cuda:0"), ("gpu", "cuda:0"), ("1", "cuda:1")])
def test_devices_mean_what_people_mean(monkeypatch, said, meant):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert str(_device(said)) == meant
    with pytest.raises(ValueError, match="--device 2: there are 2 CUDA devices"):
        _device("2")


def test_mps_says_why_not(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device mps: .*; leave --device away"):
        _device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert _device("mps").type == "mps"
    assert open_extractor("fashion-cnn").device.type == "cpu"
