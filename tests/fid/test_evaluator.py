"""One pass over the images: any batch, order, rank and interruption gives the same numbers."""

import errno
import os

import pytest
import torch

from fid.evaluator import Collector, measure
from fid.features import Extractor, Features, open_extractor
from fid.frechet import Gaussian, frechet_distance
from fid.metrics import inception_score
from fid.names import METRICS
from fid.precision_recall import precision_recall
from fid.store import FeatureStore

N = 1100
QUICK = (
    "fid",
    "is",
    "precision",
    "recall",
    "density",
    "coverage",
)  # KID and the extrapolation cost seconds; they see the same rows


class Stub(Extractor):
    """Eight grey means of image columns as features, the first three as logits."""

    name, dim, num_classes, sha256, comparable = "stub", 8, 3, "00", "a test"

    def extract(self, images):
        pool = images.float().mean((1, 2))
        return Features(pool, pool[:, :3])


IMAGES = torch.randint(0, 256, (N, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
REFERENCE = Stub()(
    torch.randint(0, 240, (1000, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
).pool
GAUSSIAN = Gaussian(REFERENCE.mean(0), torch.cov(REFERENCE.double().T))


def collect(order, batch: int, metrics=METRICS, **options) -> Collector:
    collector = Collector(Stub(), N, metrics, **options)
    for indices in torch.as_tensor(order).split(batch):
        collector.update(IMAGES[indices], indices.tolist())
    return collector


def values(collector: Collector, metrics=METRICS) -> dict[str, float]:
    return measure(metrics, generated=collector, reference=GAUSSIAN, reference_features=REFERENCE, k=5)


def check_quick(collector: Collector, whole: dict[str, float]) -> None:
    found = values(collector, QUICK)
    assert found == pytest.approx({name: whole[name] for name in found}, rel=1e-9)
    assert torch.equal(collector.features, Stub()(IMAGES).pool)


@pytest.fixture(scope="module")
def whole():
    return values(collect(range(N), N))


def test_all_metrics_have_their_full_names(whole):
    kinds = ("fd", "fd_inf", "fd_inf_error", "is", "is_std", "kid", "kid_std", "kid_unbiased")
    names = {f"{kind}{N}[stub]" for kind in kinds} | {
        f"{kind}{N}[stub,k=5]" for kind in ("precision", "recall", "density", "coverage")
    }
    assert set(whole) == names


def test_they_are_the_plain_functions(whole):
    pool, logits = Stub()(IMAGES)
    gaussian = Gaussian(pool.double().mean(0), torch.cov(pool.double().T))
    assert whole[f"fd{N}[stub]"] == pytest.approx(frechet_distance(generated=gaussian, reference=GAUSSIAN), rel=1e-9)
    assert whole[f"is{N}[stub]"] == inception_score(logits).mean
    assert whole[f"recall{N}[stub,k=5]"] == precision_recall(generated=pool, reference=REFERENCE, k=5).recall


@pytest.mark.parametrize("batch", [3, 37, 400])
def test_any_batch_and_order(whole, batch):
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(batch))
    check_quick(collect(shuffled, batch), whole)


def test_a_killed_evaluation_goes_on(whole, tmp_path):
    """Killed after 600 images, 400 of which the saved state knows; with the rows in files and with all in the state."""
    for folder in (None, tmp_path):
        killed = Collector(Stub(), N, METRICS, folder=folder)
        killed.update(IMAGES[:400], range(400))
        torch.save(killed.state(), tmp_path / "state.pt")
        killed.update(IMAGES[400:600], range(400, 600))
        del killed
        resumed = Collector(Stub(), N, METRICS, folder=folder)
        resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
        resumed.update(IMAGES[400:], range(400, N))
        check_quick(resumed, whole)


def test_past_the_limit_features_go_to_a_file_that_disappears():
    in_memory, in_file = FeatureStore(100, 8), FeatureStore(100, 8, limit_mib=0)
    assert in_memory.path is None
    path = in_file.path
    assert path.stat().st_size == 100 * 8 * 4
    for store in (in_memory, in_file):
        store.put(range(50, 100), REFERENCE[50:100])
        store.put(range(50), REFERENCE[:50])
    assert torch.equal(in_file.tensor(), in_memory.tensor())
    assert torch.equal(in_file.tensor(), REFERENCE[:100])
    del store, in_file
    assert not path.exists()


def test_a_full_disk_is_an_error_with_the_file_s_name(tmp_path, monkeypatch):
    """Without space behind it, the first write into the map ended the process with SIGBUS."""

    def full(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: 3 MiB are needed.*features\.f32"):
        FeatureStore(1000, 1000, file=tmp_path / "features.f32")


def test_the_space_of_kept_features_is_on_the_disk_from_the_start(tmp_path):
    store = FeatureStore(1000, 1000, file=tmp_path / "features.f32")
    assert store.path.stat().st_blocks * 512 >= 4_000_000


def test_features_are_kept_only_when_asked_for():
    assert collect(range(N), 100, metrics=("fid",)).stores == {}
    assert set(collect(range(N), 100, metrics=("fid", "is")).stores) == {"logits"}
    with pytest.raises(ValueError, match="were not kept"):
        _ = collect(range(N), 100, metrics=("fid",)).features


def test_exactly_n_images_count():
    with pytest.raises(ValueError, match="1099 images were counted, expected 1100"):
        values(collect(range(N - 1), 100, metrics=("fid",)), ("fid",))
    with pytest.raises(ValueError, match="1 of 1100 images have no features"):
        _ = collect(range(N - 1), 100).features
    collector = collect(range(10), 10)
    with pytest.raises(ValueError, match="came twice"):
        collector.update(IMAGES[9:12], [9, 10, 11])
    with pytest.raises(ValueError, match="do not fit into a store of 1100"):
        collector.update(IMAGES[:1], [N])


def test_what_a_metric_needs_is_named():
    collector = collect(range(N), 100)
    with pytest.raises(ValueError, match="kid needs a reference"):
        measure(("kid",), generated=collector)
    with pytest.raises(ValueError, match="unknown metrics sfid"):
        Collector(Stub(), N, ("fid", "sfid"))
    silent = Stub()
    silent.num_classes = 0
    with pytest.raises(ValueError, match="stub has no classes"):
        Collector(silent, N, ("is",))


def test_every_image_has_one_index():
    """A set that keeps no features has nothing else to see it by."""
    collector = Collector(open_extractor("fashion-cnn"), num_images=4, metrics=("fid",))
    with pytest.raises(ValueError, match="4 images came with 3 indices"):
        collector.update(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), range(3))
