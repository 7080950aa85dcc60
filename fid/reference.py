"""Reference statistics in files: mean, covariance and where they came from. Never a pickle."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fid.files import replacing
from fid.frechet import Gaussian
from fid.moments import Moments


@dataclass(frozen=True, eq=False, kw_only=True)
class Reference(Gaussian):
    """Statistics of a reference set as a file holds them. count: number of images, None if the file does not say
    (published files)."""

    extractor: str | None  # name of the feature network; None: the file does not say
    provenance: dict[str, object]  # what the writer recorded; empty for published files
    sha256: str  # of the file's bytes


def read_reference(path: Path | str) -> Reference:
    """Statistics from an .npz with `mu` (D,) and `sigma` (D, D) in float32 or float64.

    That is our own files, ADM's (whose arr_0, mu_s and sigma_s are ignored), EDM's and pytorch-fid's.
    Raises FileNotFoundError, or ValueError naming the keys found if there are no such arrays. Pickles are never opened.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no reference statistics at {path}")
    data = path.read_bytes()
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            keys = file.files if isinstance(file, np.lib.npyio.NpzFile) else []
            arrays = {key: file[key] for key in ("mu", "sigma", "count", "provenance") if key in keys}
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not an .npz of plain arrays ({error}). Pickled statistics are never opened: {_ADVICE}"
        ) from error
    if "mu" not in arrays or "sigma" not in arrays:
        images = (
            " It holds images; `neon fid ref --data FILE --out ref.npz` makes statistics of them."
            if "arr_0" in keys
            else ""
        )
        raise ValueError(
            f"{path}: expected the arrays mu and sigma, found {', '.join(keys) or 'a bare array'}.{images}"
        )
    provenance = json.loads(str(arrays["provenance"])) if "provenance" in arrays else {}
    try:
        return Reference(
            torch.from_numpy(arrays["mu"]),
            torch.from_numpy(arrays["sigma"]),
            count=int(arrays["count"]) if "count" in arrays else None,
            extractor=provenance.get("extractor"),
            provenance=provenance,
            sha256=hashlib.sha256(data).hexdigest(),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_ADVICE = "convert them where you trust them, with numpy.savez(FILE, mu=mean, sigma=covariance)"


def write_reference(path: Path | str, moments: Moments, provenance: Mapping[str, object]) -> None:
    """Write mu, sigma (float64), count and provenance (JSON; give it "extractor", the extractor's name) as an .npz.

    There is never half a file under its name. Raises ValueError for fewer than 2 images or
    provenance that is not JSON.
    """
    try:
        text = json.dumps(dict(provenance), sort_keys=True)
    except TypeError as error:
        raise ValueError(f"the provenance of {path} is not JSON: {error}") from error
    gaussian = moments.gaussian()
    mu, sigma = gaussian.mean.numpy(), gaussian.covariance.numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as stream:
        np.savez_compressed(stream, mu=mu, sigma=sigma, count=np.int64(moments.count), provenance=np.str_(text))
