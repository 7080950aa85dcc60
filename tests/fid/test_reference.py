"""Reference files: what is read, what is refused, what is written."""

import json
import pickle

import numpy as np
import pytest
import torch

from fid.frechet import frechet_distance
from fid.moments import Moments
from fid.partial import Partial, merge_partials, read_partial, write_partial
from fid.reference import check_made_with, read_reference, write_reference
from tests.quarters_extractor import Quarters

MU, SIGMA = np.arange(4.0), np.diag([1.0, 2.0, 3.0, 0.5])


def some_moments(start: int = 0, stop: int = 50) -> Moments:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    moments = Moments(4)
    moments.update(x[start:stop])
    return moments


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_published_layouts(tmp_path, dtype):
    """EDM's and the ADM statistics, and ADM's image batches that carry statistics beside arr_0."""
    np.savez(tmp_path / "edm.npz", mu=MU.astype(dtype), sigma=SIGMA.astype(dtype))
    adm = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    np.savez(tmp_path / "adm.npz", mu=MU.astype(dtype), sigma=SIGMA.astype(dtype), **adm)
    for name in ("edm.npz", "adm.npz"):
        reference = read_reference(tmp_path / name)
        assert reference.mean.dtype == reference.covariance.dtype == torch.float64
        assert reference.mean.tolist() == MU.tolist()
        assert reference.covariance.tolist() == SIGMA.tolist()
        assert (reference.count, reference.extractor, reference.provenance) == (None, None, {})


def test_what_is_written_is_read(tmp_path):
    moments = some_moments()
    write_reference(tmp_path / "new" / "ref.npz", moments, {"extractor": "mine", "data": "x.zip"})
    reference = read_reference(tmp_path / "new" / "ref.npz")
    assert torch.equal(reference.mean, moments.gaussian().mean)
    assert torch.equal(reference.covariance, moments.gaussian().covariance)
    assert (reference.count, reference.extractor, reference.provenance["data"]) == (50, "mine", "x.zip")
    assert frechet_distance(generated=moments.gaussian(), reference=reference) < 1e-12
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["ref.npz"]  # no temporary file is left


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_reference(tmp_path / "ref.npz", some_moments(), {})
    before = (tmp_path / "ref.npz").read_bytes()
    with pytest.raises(ValueError, match="not JSON"):
        write_reference(tmp_path / "ref.npz", some_moments(), {"extractor": object()})
    with pytest.raises(ValueError, match="at least 2 images"):
        write_reference(tmp_path / "ref.npz", some_moments(0, 1), {})
    assert (tmp_path / "ref.npz").read_bytes() == before


def test_errors_say_what_was_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        read_reference(tmp_path / "none.npz")
    np.savez(tmp_path / "m.npz", m=MU, s=SIGMA)
    with pytest.raises(ValueError, match="expected the arrays mu and sigma, found m, s"):
        read_reference(tmp_path / "m.npz")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"found arr_0\..*neon fid ref"):
        read_reference(tmp_path / "images.npz")
    np.save(tmp_path / "images.npy", np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images\.npy: .*found a bare array.*neon fid ref"):
        read_reference(tmp_path / "images.npy")
    np.savez(tmp_path / "many.zip", **{f"{i}.png": MU for i in range(100)})
    with pytest.raises(ValueError, match=r"found 0\.png, .* 7\.png, \.\.\. \(100 names\)\..*neon fid ref") as error:
        read_reference(tmp_path / "many.zip.npz")
    assert len(str(error.value)) < 400
    np.savez(tmp_path / "shape.npz", mu=MU, sigma=SIGMA[:3, :3])
    with pytest.raises(ValueError, match=r"shape\.npz: expected mean"):
        read_reference(tmp_path / "shape.npz")


@pytest.mark.parametrize(
    ("sigma", "what"),
    [
        (-np.eye(4), "negative variance"),
        (np.array([[1.0, 2, 0, 0], [2, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "not positive semi-definite"),
        (np.eye(4) * 1j, "sigma is complex128"),
        (np.eye(4, dtype=int), "sigma is int64"),
    ],
)
def test_what_is_no_covariance_is_refused(tmp_path, sigma, what):
    np.savez(tmp_path / "ref.npz", mu=MU, sigma=sigma)
    with pytest.raises(ValueError, match=rf"ref\.npz: .*{what}"):
        read_reference(tmp_path / "ref.npz")


def test_a_singular_covariance_is_one(tmp_path):
    """Rank 1, in float32, so that rounding makes some eigenvalues negative; and all zeros."""
    row = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
    for name, sigma in (("rank1.npz", row.T @ row), ("zero.npz", np.zeros((64, 64)))):
        np.savez(tmp_path / name, mu=np.zeros(64), sigma=sigma)
        assert len(read_reference(tmp_path / name).mean) == 64


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404", "a web page"),
        (b"PK\x03\x04 cut", "not an .npz of plain arrays"),
        (b"hello", "not an .npz of plain arrays"),
    ],
)
def test_other_things_under_the_name_of_statistics(tmp_path, data, what):
    (tmp_path / "ref.npz").write_bytes(data)
    with pytest.raises(ValueError, match=rf"ref\.npz: {what}") as error:
        read_reference(tmp_path / "ref.npz")
    assert "BytesIO" not in str(error.value)


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"provenance": np.str_("{")}, "Expecting property name"),
        ({"provenance": np.str_("[1]")}, "the provenance is list"),
        ({"count": np.float64(3.5)}, "count is float64 3.5"),
        ({"count": np.int64(-1)}, "count is int64 -1"),
    ],
)
def test_damaged_records_beside_the_statistics_name_the_file(tmp_path, extra, what):
    np.savez(tmp_path / "ref.npz", mu=MU, sigma=SIGMA, **extra)
    with pytest.raises(ValueError, match=rf"ref\.npz: {what}"):
        read_reference(tmp_path / "ref.npz")


@pytest.mark.parametrize(
    ("provenance", "dim", "what"),
    [
        ({"extractor": "others"}, 12, "holds features of others, the images get those of quarters"),
        ({"extractor": "quarters", "extractor_sha256": "1" * 64}, 12, "made with other weights of quarters"),
        ({}, 4, "holds statistics of 4 features, quarters gives 12"),
    ],
)
def test_a_reference_of_another_extractor_is_refused(tmp_path, provenance, dim, what):
    moments = Moments(dim)
    moments.update(torch.eye(dim))
    write_reference(tmp_path / "ref.npz", moments, provenance)
    with pytest.raises(ValueError, match=rf"ref\.npz: .*{what}"):
        check_made_with(read_reference(tmp_path / "ref.npz"), Quarters())


@pytest.mark.parametrize("provenance", [{}, {"extractor": "quarters"}, {"extractor_sha256": "0" * 64}])
def test_a_reference_that_says_nothing_else_is_taken(tmp_path, provenance):
    moments = Moments(12)
    moments.update(torch.eye(12))
    write_reference(tmp_path / "ref.npz", moments, provenance)
    check_made_with(read_reference(tmp_path / "ref.npz"), Quarters())


class Bomb:
    def __reduce__(self):
        return (pytest.exit, ("a pickle was executed",))


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fid": Bomb()}))
    np.savez(tmp_path / "object.npz", mu=np.array([Bomb()], dtype=object), sigma=SIGMA)
    for name in ("edm2.pkl", "object.npz"):
        with pytest.raises(ValueError, match="never opened"):
            read_reference(tmp_path / name)


def partial(start: int, stop: int, **changes: str) -> Partial:
    fields = {"extractor": "mine", "extractor_sha256": "00", "source": "seeds 0-49", **changes}
    return Partial(some_moments(start, stop), images=((start, stop),), num_images=50, **fields)


def test_parts_of_several_machines_add_up(tmp_path):
    for i, (start, stop) in enumerate([(0, 20), (20, 37), (37, 50)]):
        write_partial(tmp_path / f"{i}.safetensors", partial(start, stop))
    parts = [read_partial(tmp_path / f"{i}.safetensors") for i in (2, 0, 1)]
    merged, whole = merge_partials(parts), some_moments()
    assert merged.images == ((0, 50),)
    torch.testing.assert_close(merged.moments.covariance, whole.covariance, rtol=1e-12, atol=1e-14)
    assert torch.equal(merged.moments.covariance, merge_partials(parts[::-1]).moments.covariance)
    assert merge_partials(parts[:2]).images == ((0, 20), (37, 50))
    merged.check_complete()
    for some, gap in (
        (parts[:2], "20 to 37"),  # the first is the last part
        (parts[:1], "0 to 37"),
        (parts[1:], "37 to 50"),
    ):
        with pytest.raises(ValueError, match=rf"the images {gap} \(the last excluded\) of 50 are in none"):
            merge_partials(some).check_complete()


def test_parts_that_do_not_belong_together(tmp_path):
    with pytest.raises(ValueError, match="image 15 is in two"):
        merge_partials([partial(0, 20), partial(15, 30)])
    for key in ("extractor", "extractor_sha256", "source"):
        with pytest.raises(ValueError, match=f"differ in {key}: "):
            merge_partials([partial(0, 20), partial(20, 30, **{key: "other"})])
    with pytest.raises(FileNotFoundError):
        read_partial(tmp_path / "none")
    (tmp_path / "text").write_text(json.dumps({}) * 100)
    with pytest.raises(ValueError, match="not a file of partial statistics"):
        read_partial(tmp_path / "text")
    lying = Partial(some_moments(0, 20), "mine", "00", "seeds", ((0, 21),), 50)
    write_partial(tmp_path / "lying", lying)
    with pytest.raises(ValueError, match="20 images were counted, its ranges hold 21"):
        read_partial(tmp_path / "lying")
