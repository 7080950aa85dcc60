"""Reference statistics in files: mean, covariance and where they came from. Never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fid.features import Extractor
from fid.files import UNREADABLE, not_what_it_is_called, replacing, sha256_of
from fid.frechet import Gaussian
from fid.moments import Moments


@dataclass(frozen=True, eq=False, kw_only=True)
class Reference(Gaussian):
    """Statistics of a reference set as a file holds them. count: number of images, None if the file does not say
    (published files)."""

    extractor: str | None  # name of the feature network; None: the file does not say
    provenance: dict[str, object]  # what the writer recorded; empty for published files
    sha256: str  # of the file's bytes
    path: Path | None = None


def read_reference(path: Path | str) -> Reference:
    """Statistics from an .npz with `mu` (D,) and `sigma` (D, D) in float32 or float64.

    That is our own files, ADM's (whose arr_0, mu_s and sigma_s are ignored), EDM's and pytorch-fid's.
    Raises FileNotFoundError, or ValueError naming the keys found if there are no such arrays. Pickles are never opened.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no reference statistics at {path}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected an .npz with mu and sigma. {_IMAGES}")
    if (instead := not_what_it_is_called(path)) is not None:
        raise ValueError(f"{path}: {instead}")
    try:
        file = np.load(path, allow_pickle=False)
        keys, arrays = [], {}
        if isinstance(file, np.lib.npyio.NpzFile):  # else the one array of an .npy
            with file:
                keys = file.files
                arrays = {key: file[key] for key in ("mu", "sigma", "count", "provenance") if key in keys}
    except UNREADABLE as error:
        raise ValueError(
            f"{path}: not an .npz of plain arrays ({error}). Pickled statistics are never opened: {_ADVICE}"
        ) from error
    if "mu" not in arrays or "sigma" not in arrays:
        may_be_images = not keys or any(key in ("arr_0", "images") or "." in key for key in keys)  # a.png, ...
        shown = ", ".join(keys[:8]) + (f", ... ({len(keys)} names)" if len(keys) > 8 else "")
        hint = f" {_IMAGES}" if may_be_images else ""
        raise ValueError(f"{path}: expected the arrays mu and sigma, found {shown or 'a bare array'}.{hint}")
    try:
        for key in ("mu", "sigma"):
            if arrays[key].dtype not in (np.float32, np.float64):
                raise ValueError(f"{key} is {arrays[key].dtype}, expected float32 or float64")
        provenance = json.loads(str(arrays["provenance"])) if "provenance" in arrays else {}
        if not isinstance(provenance, dict):
            raise ValueError(f"the provenance is {type(provenance).__name__}, expected a JSON object")
        found = Reference(
            torch.from_numpy(arrays["mu"]),
            torch.from_numpy(arrays["sigma"]),
            count=_count(arrays["count"]) if "count" in arrays else None,
            extractor=provenance.get("extractor"),
            provenance=provenance,
            sha256=sha256_of(path),
            path=path,
        )
        found.check_semidefinite()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return found


_ADVICE = "convert them where you trust them, with numpy.savez(FILE, mu=mean, sigma=covariance)"
_IMAGES = "If these are images, `neon fid ref --data IMAGES --out ref.npz` makes statistics of them."


def _count(array: np.ndarray) -> int:
    if array.shape != () or not np.issubdtype(array.dtype, np.integer) or array < 2:
        raise ValueError(f"count is {array.dtype} {array.tolist()}, expected one whole number of at least 2 images")
    return int(array)


def check_name(reference: Reference, name: str) -> None:
    """Raise ValueError if the statistics say that another extractor than `name` made them; weights are not needed."""
    if reference.extractor not in (None, name):
        raise ValueError(
            f"{reference.path or 'the reference'}: holds features of {reference.extractor}, the images get those of "
            f"{name}: their distance means nothing; name the extractor that made it with --extractor, or make it again "
            f"with `neon fid ref --extractor {name}`"
        )


def check_made_with(reference: Reference, extractor: Extractor) -> None:
    """Raise ValueError unless the statistics are of the extractor's features: the same name and the same weights where
    the file records them (published files do not), the same number in any case."""
    check_name(reference, extractor.name)
    where = reference.path or "the reference"
    advice = f"make it again with `neon fid ref --extractor`, or name its own extractor for {extractor.name}"
    made_with = reference.provenance.get("extractor_sha256")
    if made_with not in (None, extractor.sha256):
        raise ValueError(
            f"{where}: was made with other weights of {extractor.name} (sha256 {str(made_with)[:16]}..., here "
            f"{extractor.sha256[:16]}...): their distance means nothing; {advice}"
        )
    if len(reference.mean) != extractor.dim:
        raise ValueError(
            f"{where}: holds statistics of {len(reference.mean)} features, {extractor.name} gives {extractor.dim}: "
            f"another extractor made it; {advice}"
        )


def write_reference(path: Path | str, moments: Moments, provenance: Mapping[str, object]) -> None:
    """Write mu, sigma (float64), count and provenance (JSON; give it "extractor", the extractor's name) as an .npz.

    There is never half a file under its name. Raises ValueError for fewer than 2 images or
    provenance that is not JSON.
    """
    write_gaussian(path, moments.gaussian(), provenance)


def write_gaussian(path: Path | str, gaussian: Gaussian, provenance: Mapping[str, object]) -> None:
    """As `write_reference`, of a mean and covariance that are there already; their count may be unknown."""
    try:
        text = json.dumps(dict(provenance), sort_keys=True)
    except TypeError as error:
        raise ValueError(f"the provenance of {path} is not JSON: {error}") from error
    mu, sigma = gaussian.mean.numpy(), gaussian.covariance.numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as stream:
        if gaussian.count is None:
            np.savez_compressed(stream, mu=mu, sigma=sigma, provenance=np.str_(text))
        else:
            np.savez_compressed(stream, mu=mu, sigma=sigma, count=np.int64(gaussian.count), provenance=np.str_(text))
