"""A complete experiment on the smallest family (tests/core/line.py): base checkpoint, reference and config on disk."""

from pathlib import Path

import pytest
import torch

from fid.moments import Moments
from fid.reference import write_reference
from neon.checkpoints import checkpoint
from tests.core.line_family import Line, open_pixels

CONFIG = """
family = "tests.core.line_family:Line"
[base]
checkpoint = "{folder}/base.safetensors"
[sampling]
uint8 = "round"
batch = 7
[synth]
num_images = 50
shard_images = 16
cfg_scale = 1.0
[finetune]
images = 96
batch = 16
lr = 1e-2
ema_decay = 0.5
snapshot_images = 48
[select]
strategy = "grid"
num_images = 30
first_seed = 1000
w = [0.5, 1.0]
cfg_scale = [1.0, 1.2]
snapshots = "all"
[report]
num_images = 40
first_seed = 2000
cfg_scale = "selected"
extractors = {{ "tests.core.line_family:open_pixels" = "{folder}/reference.npz" }}
num_shown = 9
"""


@pytest.fixture
def line_config(tmp_path: Path) -> Path:
    """Path of the config; base and reference lie beside it."""
    family = Line()
    model = family.build({})
    checkpoint.write(
        tmp_path / "base.safetensors",
        model.state_dict(),
        metadata={"family": "tests.core.line_family:Line", "arch": {}, "weights": "ema"},
    )
    generator = torch.Generator().manual_seed(0)
    real = (
        model.mean.detach()[torch.arange(500) % 3] * 1.1 + 0.25 * torch.randn(500, 1, 4, 4, generator=generator)
    ).clamp(-1, 1)
    extractor = open_pixels(path=None, device="cpu", allow_unknown_weights=False)
    moments = Moments(16)
    moments.update(extractor(((real + 1) * 127.5).round().to(torch.uint8)).pool)
    write_reference(tmp_path / "reference.npz", moments, {"extractor": extractor.name})
    path = tmp_path / "line.toml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path
