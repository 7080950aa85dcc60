"""The evaluator against torch-fidelity's and pytorch-fid's numbers (name-seeded Inception, random features)."""

import json
import math
import zlib

import numpy as np
import pytest
import torch

from fid.frechet import frechet_distance
from fid.inception import InceptionV3
from fid.metrics import inception_score, kernel_distance_unbiased
from fid.moments import Moments
from fid.precision_recall import precision_recall
from fid.resize import resize_tf1
from tests import goldens

INCEPTION = goldens.collect("fid", "inception_features*.npz")
RESIZE = goldens.collect("fid", "tf1_resize*.npz")
METRICS = goldens.collect("fid", "metrics*.npz")


@pytest.fixture(scope="module")
def inception():
    """Name-seeded; the ndim >= 2 case times sqrt(2), BatchNorm statistics as the goldens' protocol says."""
    network = InceptionV3().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            value = goldens.name_seeded(name, parameter.shape)
            parameter.copy_(value * math.sqrt(2) if value.ndim >= 2 else value)
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                r = torch.randn(buffer.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
                buffer.copy_(0.1 * r if name.endswith("mean") else 1 + 0.1 * r.abs())
    return network


def images_of(config: dict, size: int) -> torch.Tensor:
    """The recipe that the golden's config tells in words."""
    generator, n = torch.Generator().manual_seed(config["seed"]), config["n"]
    low = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    repeat = math.ceil(size / 8)
    low = low.repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)[:, :, :size, :size]
    return low // 2 + torch.randint(0, 32, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def test_inception_equals_the_published_state_dict(inception):
    ours, published = goldens.manifest_of(inception), goldens.manifest("fid", "inception-2015-12-05")
    assert list(ours) == list(published)
    assert ours == published


def inception_cases():
    return [(file, size) for file in INCEPTION for size in goldens.config_of(file)["sizes"]]


@pytest.mark.parametrize(("file", "size"), inception_cases(), ids=lambda value: getattr(value, "stem", value))
def test_inception_features(inception, file, size):
    """float32 rounding is 1e-6; another resize or pool moves the features by more than 1e-2."""
    config, arrays = goldens.load(file)
    images = images_of(config, size)
    assert images.long().sum().item() == arrays[f"sum_{size}"]
    if f"images_{size}" in arrays:
        assert torch.equal(images, goldens.tensor(arrays[f"images_{size}"]))
    with torch.no_grad():
        taps = inception(images)
    for tap in ("64", "192", "768", "2048", "logits_unbiased"):
        goldens.assert_close(taps[tap], arrays[f"{tap}_{size}"], atol=1e-5, rtol=1e-5, what=f"{tap} at {size}")


@pytest.mark.parametrize("file", RESIZE, ids=lambda file: file.stem)
def test_tf1_resize(file):
    with np.load(file) as data:
        arrays = dict(data)
    for name, image in arrays.items():
        if name.startswith("in_"):
            expected = arrays["out_" + name.removeprefix("in_")]
            goldens.assert_close(
                resize_tf1(goldens.tensor(image).float(), *expected.shape[2:]), expected, atol=1e-4, what=name
            )


def metric_cases():
    cases = []
    for file in METRICS:
        with np.load(file) as data:
            cases += [(file, name) for name in json.loads(str(data["expected"]))]
    return cases


@pytest.mark.parametrize(("file", "name"), metric_cases(), ids=lambda value: getattr(value, "stem", value))
def test_metrics(file, name):
    with np.load(file) as data:
        expected = json.loads(str(data["expected"]))[name]
        generated, reference = goldens.tensor(data[f"{name}_generated"]), goldens.tensor(data[f"{name}_reference"])
    gaussians = []
    for features in (generated, reference):
        moments = Moments(features.shape[1])
        moments.update(features)
        gaussians.append(moments.gaussian())
    for key, value in expected.items():
        if key.startswith("fid"):
            # the three published values differ among each other by 2e-13
            assert frechet_distance(generated=gaussians[0], reference=gaussians[1]) == pytest.approx(value, rel=1e-9), (
                key
            )
        elif key.startswith("is_of_3x"):
            assert inception_score(3 * generated) == pytest.approx(value, rel=1e-6), key  # theirs: float32 softmax
        elif key.startswith("pr_k"):
            found = precision_recall(generated=generated, reference=reference, k=int(key.removeprefix("pr_k")))
            assert [found.precision, found.recall] == pytest.approx(value, abs=1e-6), key
        elif key == "kid_full_unbiased":
            assert kernel_distance_unbiased(generated=generated, reference=reference) == pytest.approx(value, abs=1e-8)
        else:
            pytest.fail(f"{file.name}: nothing here computes {key}")
