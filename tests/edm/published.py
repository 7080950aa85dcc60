"""EDM checkpoints as NVIDIA's and Neon's scripts write them, and a name-seeded Inception."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edm.family import EDM
from edm.precond import Denoiser
from fid.features import Extractor
from fid.inception import InceptionExtractor, InceptionV3
from tests import goldens
from tests.core import pickles

PLAIN = (int, float, str, bool, list, dict, type(None))
TINY = {
    "class_name": "EDMPrecond",
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 4,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 1],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "augment_dim": 9,
}


def write_checkpoint(patch: pytest.MonkeyPatch, path: Path, arch: dict, *, protocol: int = 4) -> Denoiser:
    """A `network-snapshot-*.pkl` of the name-seeded network; returns the network."""
    net = goldens.seed_by_name(EDM().build(arch)).eval().requires_grad_(False)
    snapshot = {
        "ema": persistent(net, {k: v for k, v in arch.items() if k != "class_name"}),
        "loss_fn": None,
        "augment_pipe": None,
    }
    pickles.write(patch, path, {**snapshot, "dataset_kwargs": {"resolution": net.img_resolution}}, protocol)
    return net


def persistent(module: nn.Module, init_kwargs: dict) -> object:
    """Classes of the original's own are persistent objects with plain attributes; torch's are pickled by reference."""
    children = {name: child if child is None else persistent(child, {}) for name, child in module._modules.items()}
    if isinstance(module, nn.ModuleDict):
        shallow = nn.ModuleDict.__new__(nn.ModuleDict)
        shallow.__dict__ = {**vars(module), "_modules": children}
        return shallow
    found = pickles.persistent_module(module, type(module).__name__, init_kwargs)
    state = found.meta["state"]
    found.meta["state"] = {
        **{name: value for name, value in state.items() if name.startswith("_") or isinstance(value, PLAIN)},
        "skip_scale": np.float64(math.sqrt(0.5)),  # an attribute of the originals' blocks that is no plain number
        "_modules": children,
    }
    return found


def seeded_inception() -> InceptionV3:
    """The FID Inception with the goldens' weights: its features are numbers of a sensible size and mean nothing."""
    network = InceptionV3()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            value = goldens.name_seeded(name, parameter.shape)
            parameter.copy_(value * math.sqrt(2) if value.ndim >= 2 else value)
    return network


def open_seeded_inception(*, path: Path | None, device: torch.device | str, allow_unknown_weights: bool) -> Extractor:
    return InceptionExtractor(seeded_inception(), sha256=hashlib.sha256(b"name-seeded").hexdigest(), device=device)
