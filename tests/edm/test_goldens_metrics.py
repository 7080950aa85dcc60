"""The evaluator against the metrics that ship with EDM's scripts."""

import pytest
import torch

from fid.frechet import Gaussian, frechet_distance
from fid.moments import Moments
from fid.precision_recall import precision_recall
from tests import goldens

STATS = goldens.collect("edm", "stats_official*.npz")
FORMULA = goldens.collect("edm", "fid_formula*.npz")
PRDC = goldens.collect("edm", "prdc_*.npz")


def stand_in_features(images: torch.Tensor, dim: int) -> torch.Tensor:
    """The golden's detector: f_i = a_i b_i + a_i / 4 with a_i = x[i mod D], b_i = x[(7 i + 3) mod D] of the flattened
    CHW pixels."""
    x = images.flatten(1).float() / 255
    index = torch.arange(dim)
    a, b = x[:, index % x.shape[1]], x[:, (7 * index + 3) % x.shape[1]]
    return a * b + 0.25 * a


@pytest.mark.parametrize("file", STATS, ids=lambda file: file.stem)
def test_statistics(file):
    config, arrays = goldens.load(file)
    features = stand_in_features(goldens.tensor(arrays["images"]).permute(0, 3, 1, 2), len(arrays["mu"]))
    assert len(features) == config["n"]
    moments = Moments(features.shape[1])
    for batch in features.split(config["batch"]):
        moments.update(batch)
    covariance = moments.covariance
    goldens.assert_close(moments.mean, arrays["mu"], atol=1e-7)  # features are float32
    goldens.assert_close(covariance.diagonal(), arrays["sigma_diag"], atol=1e-8, rtol=1e-6)
    assert covariance.trace().item() == pytest.approx(float(arrays["sigma_trace"]), rel=1e-6)
    assert covariance.norm().item() == pytest.approx(float(arrays["sigma_fro"]), rel=1e-6)
    head = len(arrays["sigma_head"])
    goldens.assert_close(covariance[:head, :head], arrays["sigma_head"], atol=1e-8, rtol=1e-6)
    # the selection scripts' covariance is too large by mu mu^T / (n - 1); we reproduce the formula here, never in the
    # product
    excess = moments.mean.square() / (len(features) - 1)
    goldens.assert_close(covariance.diagonal() + excess, arrays["sigma_all_diag"], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("file", FORMULA, ids=lambda file: file.stem)
def test_frechet_formula(file):
    """Full rank: 1e-9 relative. Singular: scipy's sqrtm itself is only good to 1e-8 relative, 2e-6 absolute."""
    _, arrays = goldens.load(file)
    one, two = (Gaussian(goldens.tensor(arrays[f"mu{i}"]), goldens.tensor(arrays[f"sigma{i}"])) for i in (1, 2))
    singular = float(torch.linalg.eigvalsh(one.covariance)[0]) < 1e-10
    for key in ("fid_official", "fid_eig"):
        tolerance = {"abs": 2e-6, "rel": 2e-8} if singular else {"rel": 1e-9}
        assert frechet_distance(generated=one, reference=two) == pytest.approx(float(arrays[key]), **tolerance), key
        assert frechet_distance(generated=two, reference=one) == pytest.approx(float(arrays[key]), **tolerance), key
    assert 0 <= frechet_distance(generated=one, reference=one) < 1e-8


@pytest.mark.parametrize("file", PRDC, ids=lambda file: file.stem)
def test_prdc(file):
    config, arrays = goldens.load(file)
    found = precision_recall(
        generated=goldens.tensor(arrays["fake"]),
        reference=goldens.tensor(arrays["real"]),
        k=config["nearest_k"],
        boundary="outside",
    )
    expected = {name: float(arrays[name]) for name in found._fields}
    assert found._asdict() == pytest.approx(expected, abs=1e-12)
