"""Files of published feature networks: where they lie, whether they are the right ones, how they are read."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fid.files import not_what_it_is_called, sha256_of


def cache_folder() -> Path:
    """$NEON_CACHE, or ~/.cache/neon. Raises FileNotFoundError if there is neither."""
    named = os.environ.get("NEON_CACHE")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "neon"
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home folder: set NEON_CACHE to a folder for fetched files") from error


def sha256_of_tensors(tensors: dict[str, Tensor]) -> str:
    """Hex digest of names, dtypes, shapes and values: the same for the same weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """A file that others publish. It never travels with this project and is never fetched behind the user's back."""

    files: tuple[str, ...]  # names under which the same bytes circulate
    url: str
    sha256_prefix: str

    def find(self) -> Path:
        """The file in the cache folder; FileNotFoundError says what to fetch and where to put it."""
        folder = cache_folder()
        for name in self.files:
            if (folder / name).is_file():
                return folder / name
        raise FileNotFoundError(
            f"no {' or '.join(self.files)} in {folder}\n"
            f"  fetch   {self.url}\n"
            f"  sha256  begins with {self.sha256_prefix}\n"
            f"  to      {folder / self.files[0]}\n"
            "or name a copy of your own with --inception FILE; $NEON_CACHE moves the folder"
        )

    def check(self, file: Path, *, allow_unknown: bool) -> str:
        """The whole sha256 of `file`; ValueError if it is not the published one and that is not allowed."""
        if not Path(file).is_file():
            raise FileNotFoundError(f"no feature-network weights at {file}; the published file is {self.url}")
        sha256 = sha256_of(file)
        if not sha256.startswith(self.sha256_prefix) and not allow_unknown:
            raise ValueError(
                f"{file}: sha256 is {sha256}, the published weights begin with {self.sha256_prefix}. With other "
                "weights the value "
                "is no FID. Fetch the published file, or pass --allow-unknown-weights (the result is then marked not "
                "comparable)"
            )
        return sha256


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises ValueError naming the file if it is none."""
    if (instead := not_what_it_is_called(file)) is not None:
        raise ValueError(f"{file}: {instead}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a .safetensors file ({error})") from error


def read_state_dict(file: Path, *, into: nn.Module) -> None:
    """Load a plain state dict (.pth) strictly; nothing in the file is executed.

    Raises ValueError if the file is not a state dict of tensors or its keys or shapes differ from the network's.
    """
    check_and_load(file, read_tensors(file), into=into)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a plain state dict (.pth); nothing in the file is executed. Raises ValueError if it is none."""
    if (instead := not_what_it_is_called(file)) is not None:
        raise ValueError(f"{file}: {instead}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        LookupError,
        ValueError,
    ) as error:  # what torch raises on foreign bytes
        raise ValueError(
            f"{file}: not a plain PyTorch state dict ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{file}: expected a state dict, found {type(state).__name__}")
    return state


def check_and_load(file: Path, state: Mapping[str, Tensor], *, into: nn.Module) -> None:
    """Load tensors strictly. Raises ValueError naming the file if names or shapes differ from the network's."""
    expected = into.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{file}: not the weights of {type(into).__name__}: {len(missing)} entries missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ValueError(f"{file}: {name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}")
    into.load_state_dict(state)
