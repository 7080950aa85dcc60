"""The examples of docs/library.md, run as they stand there."""

import re
import subprocess
import sys
from pathlib import PurePath

import numpy as np
import pytest
import torch

import neon
from fid.reference import Reference
from neon.evaluation.compute import open_reference, open_side
from neon.images.formats import open_images
from neon.images.image_set import ImageSet
from tests.commands import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S)


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_ten_lines_improve_the_example():
    network, call, *_ = BLOCKS
    space: dict = {}
    exec(network, space)
    torch.manual_seed(0)
    model = space["model"] = space["Net"]()
    data = torch.randn(2000, 2) @ torch.linalg.cholesky(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).T
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        optimizer.zero_grad()
        batch = data[torch.randint(2000, (128,), generator=generator)]
        space["loss"](model, batch, None, generator).mean().backward()
        optimizer.step()
    exec(call, space)
    result = space["result"]
    assert result.scores["neon"] < result.scores["base"] < result.scores["self-trained"]
    assert all(torch.equal(value, result.weights[name]) for name, value in model.state_dict().items())
    own = [line for line in "".join([network.split("def sample")[1], call]).splitlines() if line.strip()]
    assert len(own) <= 20  # two functions, the score, and what is done with the result


def test_the_edm_example_and_the_parts(in_root):
    _, _, edm, parts = BLOCKS
    space: dict = {"torch": torch, "neon": neon}
    exec(edm, space)
    own = [line for line in edm.splitlines() if line.strip() and not line.startswith("from ")]
    assert len(own) <= 10
    assert "fd24[fashion-cnn]" in space["result"].details["rows"]["neon"]["metrics"]
    space["base"] = space["model"].state_dict()
    space["synth"] = {name: value + 1 for name, value in space["base"].items()}
    space["images"], _ = space["sample"](space["model"], range(2_000_000, 2_000_024))
    exec(parts, space)
    assert space["values"]["fd24[fashion-cnn]"] == space["result"].details["base_value"]
    name, value = next(iter(space["merged"].items()))
    torch.testing.assert_close(value, space["base"][name] - 1.5)


def test_public_names_have_docstrings_and_importing_neon_loads_no_torch():
    for name in neon.__all__:
        assert getattr(neon, name).__doc__, name
    code = "import sys, neon; dir(neon); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'improved'"):
        neon.improved  # noqa: B018


def test_evaluate_refuses_floats_and_unnamed_references(in_root):
    with pytest.raises(ValueError, match=r"found float32 \(4, 1, 28, 28\)\. .*to_uint8"):
        neon.evaluate(torch.zeros(4, 1, 28, 28), "demo/reference_fashion-cnn.npz")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        neon.evaluate(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), "nowhere.npz")


@pytest.mark.parametrize("metrics", ["fid", ()])
def test_metrics_are_a_list_of_names(in_root, metrics):
    with pytest.raises(ValueError, match="metrics must be a list of names, for example"):
        neon.evaluate(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), "demo/reference_fashion-cnn.npz", metrics=metrics)


@pytest.mark.parametrize(
    ("images", "reference", "message"),
    [
        (
            [torch.zeros(1, 28, 28)] * 2,
            "demo/reference_fashion-cnn.npz",
            r"images: .*, not list; a list of tensors bec",
        ),
        (
            None,
            "demo/reference_fashion-cnn.npz",
            r"images: expected a path or one uint8 .* \(N, C, H, W\), not NoneType",
        ),
        (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), [torch.zeros(1, 28, 28)], r"reference: .*, not list; a list of"),
        (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), {"fashion-cnn": 3}, r"reference: expected a path .*, not int"),
    ],
)
def test_evaluate_takes_one_tensor_or_a_path(in_root, images, reference, message):
    with pytest.raises(ValueError, match=message):
        neon.evaluate(images, reference)


def test_any_path_will_do(tmp_path):
    """os.PathLike, as pathlib's pure paths and those of other libraries are."""
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 1, 28, 28), np.uint8))
    path = PurePath(tmp_path / "images.npz")
    assert len(open_side(path)) == 2
    assert isinstance(open_reference(PurePath(ROOT / "demo/reference_pixel-pca64.npz")), Reference)
    assert isinstance(open_reference(path), ImageSet)


def test_evaluate_gives_the_same_of_a_file_and_of_a_tensor(in_root, tmp_path):
    images = open_images(ROOT / "demo/fashion_base.npz").read(range(70))
    np.savez(tmp_path / "images.npz", images=images.numpy())
    of_tensor = neon.evaluate(images, "demo/reference_fashion-cnn.npz")
    of_file = neon.evaluate(tmp_path / "images.npz", {"fashion-cnn": "demo/reference_fashion-cnn.npz"}, batch=9)
    assert of_file == pytest.approx(of_tensor, rel=1e-6)  # another batch size: float32 convolutions
    of_images = neon.evaluate(images[:35], tmp_path / "images.npz", extractor="fashion-cnn", metrics=("fid", "recall"))
    assert set(of_images) == {"fd35[fashion-cnn]", "recall35[fashion-cnn,k=3]"}
