"""The shipped classifier, the shipped statistics and the split they stand on."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fid.features import open_extractor
from fid.files import sha256_of
from fid.frechet import frechet_distance
from fid.moments import Moments
from fid.reference import read_reference
from scripts import fashion_mnist

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"


@pytest.fixture(scope="module")
def base():
    with np.load(DEMO / "fashion_base.npz") as data:
        return torch.from_numpy(data["images"])[:, None], torch.from_numpy(data["labels"]).long()


def test_the_training_log_belongs_to_the_shipped_weights():
    log = json.loads((ROOT / "results" / "fashion_cnn.json").read_text())
    assert log["sha256"] == sha256_of(ROOT / "fid" / "data" / "fashion_cnn.safetensors")
    assert log["test_accuracy"] >= 0.91
    assert (log["train_images"], log["test_images"]) == (25_000, 10_000)


def test_the_shipped_classifier_is_as_accurate_as_its_log_says(base):
    """On the base images, which it has never seen either."""
    images, labels = (part[:2000] for part in base)
    logits = torch.cat([open_extractor("fashion-cnn")(batch).logits for batch in images.split(500)])
    assert (logits.argmax(1) == labels).double().mean() > 0.90


def test_the_shipped_images_are_whole(base):
    images, labels = base
    assert (images.dtype, images.shape) == (torch.uint8, (10_000, 1, 28, 28))
    assert labels.bincount().min() > 900  # ten classes, drawn at random
    assert images.float().mean().item() / 255 == pytest.approx(0.28622, abs=5e-3)  # the whole set's mean


@pytest.mark.parametrize("name", ["fashion-cnn", "pixel-pca64"])
def test_the_shipped_references_are_of_the_same_distribution_and_extractor(base, name):
    """Real against real at n = 2,000 is small (0.2 to 0.3 % of the features' variance); the same images blurred are
    not."""
    extractor, reference = open_extractor(name), read_reference(DEMO / f"reference_{name}.npz")
    assert (reference.count, reference.extractor, len(reference.mean)) == (10_000, name, 64)
    assert reference.provenance["extractor_sha256"] == extractor.sha256

    def distance(images: torch.Tensor) -> float:
        moments = Moments(extractor.dim)
        for batch in images.split(500):
            moments.update(extractor(batch).pool)
        return frechet_distance(generated=moments.gaussian(), reference=reference)

    images = base[0][:2000]
    real = distance(images)
    assert 0 < real < 0.01 * reference.covariance.trace()
    assert distance(torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1).to(torch.uint8)) > 10 * real


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package of the same layout: image i of class c has c in its first pixel and i mod 256 in its second."""
    file = tmp_path_factory.mktemp("npm") / fashion_mnist.FASHION_ARCHIVE
    with tarfile.open(file, "w:gz") as archive:
        for label in range(10):
            rows = [[label, i % 256, *[0] * 782] for i in range(70)]
            if label == 0:
                rows = [rows[0], [], *rows[1:], []]
            content = json.dumps({"data": rows}).encode()
            member = tarfile.TarInfo(f"package/src/clothes/{label}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def test_the_split(package, monkeypatch):
    """npm order without the empty rows, torch.randperm with seed 0, disjoint parts."""
    monkeypatch.setattr(fashion_mnist, "NUM_IMAGES", 700)
    monkeypatch.setattr(fashion_mnist, "SPLIT", {"base": range(100), "reference": range(350, 450)})
    parts = fashion_mnist.load_split(package)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    for name, (start, stop) in {"base": (0, 100), "reference": (350, 450)}.items():
        images, labels = parts[name]
        assert (images.dtype, images.shape[1:]) == (torch.uint8, (1, 28, 28))
        assert torch.equal(labels, order[start:stop] // 70)
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
        assert torch.equal(images[:, 0, 0, 1].long(), order[start:stop] % 70)


def test_the_published_split_is_disjoint():
    parts = [set(indices) for indices in fashion_mnist.SPLIT.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) <= fashion_mnist.NUM_IMAGES


def test_other_archives_are_refused(package, tmp_path):
    with pytest.raises(ValueError, match="found 700 images of 784 pixels, expected 70000"):
        fashion_mnist.load_split(package)
    with pytest.raises(FileNotFoundError, match="npm pack"):
        fashion_mnist.load_split(tmp_path / "absent.tgz")
    (tmp_path / "bad.tgz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not the archive"):
        fashion_mnist.load_split(tmp_path / "bad.tgz")
    (tmp_path / fashion_mnist.FASHION_ARCHIVE).write_bytes(b"no archive")
    with pytest.raises(ValueError, match="delete it and try again"):
        fashion_mnist.fetch(tmp_path)
