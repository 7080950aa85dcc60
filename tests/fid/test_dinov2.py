"""fid.dinov2 against a forward pass written out here, Pillow's bicubic resizing and Keys' kernel."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from fid import dinov2
from fid.features import open_extractor
from fid.metrics import frechet_kind

WIDTH, DEPTH, HEADS, STORED = 48, 2, 3, 37


def named(name, shape, scale=0.2):
    """Weights that are a function of their name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape, scale=scale)).float()


@pytest.fixture(scope="module")
def state():
    network = dinov2.vision_transformer(width=WIDTH, depth=DEPTH, heads=HEADS)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    shapes |= {"pos_embed": (1, 1 + STORED**2, WIDTH), "mask_token": (1, WIDTH)}  # as the published file holds them
    return {name: named(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def extractor(state, tmp_path_factory):
    file = tmp_path_factory.mktemp("dinov2") / "weights.pth"
    torch.save(state, file)
    network = dinov2.vision_transformer(width=WIDTH, depth=DEPTH, heads=HEADS)
    dinov2.read_weights(file, network)
    return dinov2.DINOv2Extractor(network, name="dinov2-vitl14", sha256="0" * 64)


def keys(x, a=-0.75):
    """Keys' cubic kernel, as torch's bicubic interpolation has it."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resampling(stored, side):
    """(side, stored): rows of weights of the positions, the border repeated."""
    at = (np.arange(side) + 0.5) * stored / (side + 0.1) - 0.5
    matrix = np.zeros((side, stored))
    for row, x in enumerate(at):
        for tap in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            matrix[row, min(max(tap, 0), stored - 1)] += keys(x - tap)
    return matrix


def test_positions_are_resampled_as_the_network_was_published(state):
    found = dinov2.resampled(state["pos_embed"], 16)[0].numpy()
    grid = state["pos_embed"][0, 1:].reshape(STORED, STORED, WIDTH).double().numpy()
    rows = resampling(STORED, 16)
    expected = np.einsum("ay,bx,yxc->abc", rows, rows, grid).reshape(256, WIDTH)
    assert np.allclose(found[1:], expected, atol=2e-5)
    assert np.array_equal(found[0], state["pos_embed"][0, 0].numpy())


def forward(state, images):
    """The features in float64: patches, pre-norm blocks with scaled branches, the normalised class token."""
    w = {name: value.double() for name, value in state.items()}

    def normalised(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    n = len(images)
    patches = images.reshape(n, 3, 16, 14, 16, 14).permute(0, 2, 4, 1, 3, 5).reshape(n, 256, -1)
    x = patches @ w["patch_embed.proj.weight"].reshape(WIDTH, -1).T + w["patch_embed.proj.bias"]
    rows = torch.from_numpy(resampling(STORED, 16))
    grid = w["pos_embed"][0, 1:].reshape(STORED, STORED, WIDTH)
    positions = torch.einsum("ay,bx,yxc->abc", rows, rows, grid).reshape(256, WIDTH)
    token = (w["cls_token"][0] + w["pos_embed"][0, :1]).expand(n, 1, WIDTH)
    x = torch.cat([token, x + positions], 1)
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        qkv = linear(normalised(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(n, 257, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        attended = (weights @ v).transpose(1, 2).reshape(n, 257, WIDTH)
        x = x + linear(attended, f"{block}.attn.proj") * w[f"{block}.ls1.gamma"]
        h = linear(normalised(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        h = h * (1 + torch.erf(h / 2**0.5)) / 2
        x = x + linear(h, f"{block}.mlp.fc2") * w[f"{block}.ls2.gamma"]
    return normalised(x, "norm")[:, 0]


def resized(images):
    """(B, 3, 224, 224) in float64: Pillow's antialiased bicubic filter on float channels."""
    channels = [
        [np.asarray(Image.fromarray(c).resize((224, 224), Image.Resampling.BICUBIC)) for c in image]
        for image in images.float().numpy()
    ]
    return torch.from_numpy(np.array(channels)).double()


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (3, 300)])
def test_features_are_those_of_an_independent_forward_pass(extractor, state, channels, side):
    images = torch.randint(
        0, 256, (2, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    pixels = (resized(images.expand(-1, 3, -1, -1)) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    found, expected = extractor(images).pool.double(), forward(state, pixels)
    assert found.shape == (2, WIDTH)
    assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()))
    assert (expected[0] - expected[1]).abs().max() > 0.01  # the features see the image


def test_its_distance_is_no_fid(extractor):
    assert frechet_kind(extractor) == "fd"


def test_the_default_network_is_vit_l_14():
    w, network = 1024, dinov2.vision_transformer()
    block = 12 * w * w + (3 + 1 + 4 + 1) * w + 4 * w + 2 * w  # matrices, their biases, two norms, two scales
    expected = (3 * 14 * 14 + 1) * w + (1 + 257) * w + 24 * block + 2 * w
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    assert {"blocks.23.ls2.gamma", "patch_embed.proj.weight", "norm.bias"} <= network.state_dict().keys()


def test_other_weights_are_refused_before_the_network_is_built(tmp_path, monkeypatch):
    (tmp_path / "dinov2_vitl14_pretrain.pth").write_bytes(b"no weights")
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="published weights begin with d5383ea8"):
        open_extractor("dinov2-vitl14")


def test_absent_weights_say_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"fetch .*/dinov2_vitl14_pretrain"):
        open_extractor("dinov2-vitl14")
