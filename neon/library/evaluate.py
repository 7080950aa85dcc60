"""`neon.evaluate`: the metrics of images that are there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fid.features import open_extractor
from fid.names import Metric
from fid.reference import Reference, read_reference
from neon.evaluation.compute import Images, Question, compare, open_reference, open_side
from neon.evaluation.yardsticks import check_distinct
from neon.runtime.distributed import World
from neon.store import hub


def evaluate(
    images: Images,
    reference: Images | Mapping[str, str],
    *,
    metrics: Sequence[Metric] = ("fid",),
    extractor: str | None = None,
    batch: int = 64,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Metrics of images against a reference: {"fid50k[inception-2015-12-05]": value}, whose name says with what the
    value may be compared.

    images: uint8 (N, C, H, W) with 1 or 3 channels, or the path of an image set (folder, zip, npz, npy, IDX file).
    reference: images in the same forms, a statistics file as `neon fid ref` makes it (for fid and fid_inf), or several
        of either, {extractor: file}.
    extractor: the feature network. None: the one that the statistics name, for images the FID Inception.
    The same numbers as `neon fid` gives for the same set. Raises ValueError for other images or a reference of another
    extractor, FileNotFoundError if there is no such file.
    """
    world = World(device=torch.device(device))
    values: dict[str, float] = {}
    table = reference if isinstance(reference, Mapping) else {extractor: reference}
    generated, entries = open_side(images), dict[str, str]()
    for name, source in table.items():
        opened = open_reference(source)
        if name is None:
            name = _own_extractor(opened, source)
        network = open_extractor(name, device=world.device)
        check_distinct(entries, name, network.name)
        question = Question(metrics=metrics, batch=batch)
        found = compare(generated, opened, None, network, question, world)
        values |= {} if found is None else found.metrics
    return values


def _own_extractor(reference: object, source: object) -> str:
    if not isinstance(reference, Reference):
        return "inception-2015-12-05"
    if reference.extractor is None:
        raise ValueError(f"{source} does not name its extractor; say it: {{EXTRACTOR: {str(source)!r}}}")
    return reference.extractor


def references(reference: object) -> dict[str, str]:
    """{extractor: reference file}, as [report] has it, of one file that names its extractor, or of such a table."""
    if isinstance(reference, Mapping):
        return {str(name): str(path) for name, path in reference.items()}
    if not isinstance(reference, (str, Path)):
        raise ValueError(f"expected a reference file or {{extractor: file}}, found {reference!r}")
    extractor = read_reference(hub.local(reference)).extractor
    if extractor is None:
        raise ValueError(f"{reference} does not name its extractor; say it: {{EXTRACTOR: {str(reference)!r}}}")
    return {extractor: str(reference)}
