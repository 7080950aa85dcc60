"""EDM2's pickled statistics: read as numpy wrote them, and never run."""

import json
import pickle

import numpy as np
import pytest
from click.testing import CliRunner

from fid.reference import read_reference
from neon.checkpoints.pickled_statistics import read_statistics
from neon.cli.main import main

RNG = np.random.default_rng(0)
SAMPLES = RNG.normal(size=(50, 6))
MU, SIGMA = SAMPLES.mean(0), np.cov(SAMPLES, rowvar=False)


def pickled(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("change", [np.asarray, np.asfortranarray, lambda a: a.astype(">f8"), lambda a: a.astype("f4")])
def test_arrays_are_read_as_numpy_wrote_them(tmp_path, protocol, change):
    skewed = SIGMA + np.arange(36.0).reshape(6, 6)  # not symmetric: the order of rows and columns shows
    whole = {"fid": {"mu": MU, "sigma": SIGMA}, "x": {"mu": change(MU), "sigma": change(skewed)}}
    file = pickled(tmp_path / "a.pkl", whole, protocol)
    mean, covariance = read_statistics(file, "x")
    assert np.array_equal(mean, change(MU).astype("f8"))
    assert np.array_equal(covariance, change(skewed).astype("f8"))


class Hostile:
    def __reduce__(self):
        return (exec, ("raise RuntimeError('the pickle was executed')",))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"fid": {"mu": MU, "sigma": SIGMA}}, "no entry 'fd_dinov2' with mu and sigma; entries that have: fid"),
        ({"fd_dinov2": {"mu": MU, "sigma": SIGMA[:3]}}, r"found \(6,\) and \(3, 6\)"),
        ({"fd_dinov2": {"mu": MU.astype(object), "sigma": SIGMA}}, "expected an array of float32 or float64"),
        ({"fd_dinov2": {"mu": [1.0], "sigma": SIGMA}}, "expected an array of numbers"),
        ([MU], "expected a pickled dict"),
        ({"fd_dinov2": Hostile()}, "exec"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path, value, message):
    file = pickled(tmp_path / "bad.pkl", value)
    with pytest.raises(ValueError, match=message) as error:
        read_statistics(file, "fd_dinov2")
    assert str(file) in str(error.value)


def test_the_command_writes_a_reference(tmp_path):
    file, out = pickled(tmp_path / "img512.pkl", {"fd_dinov2": {"mu": MU, "sigma": SIGMA}}), tmp_path / "ref.npz"
    done = CliRunner().invoke(main, ["fid", "convert", str(file), "--out", str(out)], catch_exceptions=False)
    assert json.loads(done.output)["dim"] == 6
    found = read_reference(out)
    assert np.array_equal(found.mean.numpy(), MU)
    assert np.allclose(found.covariance.numpy(), SIGMA, rtol=0, atol=1e-15)
    assert (found.extractor, found.count, found.provenance["source"]) == ("dinov2-vitl14", None, "img512.pkl")
