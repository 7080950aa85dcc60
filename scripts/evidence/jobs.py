"""What the small experiments train: one job per base model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "small"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One base model. Overrides are those of `neon --set`."""

    name: str
    family: str
    autoencoder: str | None = None
    """Stem of the autoencoder's config in configs/small."""
    overrides: tuple[str, ...] = ()
    """Of the family's config, for training and measuring."""
    is_repeat: bool = False
    """Only what must be repeated is measured."""

    @property
    def config(self) -> Path:
        return CONFIGS / f"{self.family}.toml"


JOBS = {
    job.name: job
    for job in (
        Job(name="edm", family="edm"),
        Job(name="flow", family="flow"),
        Job(name="var", family="var", autoencoder="var_tokeniser"),
        Job(name="xar", family="xar", autoencoder="xar_vae"),
        Job(name="imm", family="imm"),
        Job(
            name="edm-again",
            family="edm",
            is_repeat=True,
            overrides=(
                "train.seed=1",
                "finetune.seed=11",
                "synth.first_seed=10_000_000",
                "select.first_seed=11_000_000",
                "report.first_seed=12_000_000",
            ),
        ),
    )
}
FAMILIES = ("edm", "flow", "var", "xar", "imm")
"""The first job of each; the other is a repeat with everything seeded anew."""


def model_path(folder: Path, job: Job) -> Path:
    """The trained base, in fp16."""
    return folder / job.name / "model.safetensors"


def autoencoder_path(folder: Path, job: Job) -> Path | None:
    return None if job.autoencoder is None else folder / job.name / "autoencoder.safetensors"


def base_overrides(folder: Path, job: Job) -> list[str]:
    """--set values that make a config work on this job's files."""
    paths = [f"base.checkpoint={model_path(folder, job)}", 'base.weights="any"']
    autoencoder = autoencoder_path(folder, job)
    return [*paths, *([] if autoencoder is None else [f"base.autoencoder={autoencoder}"]), *job.overrides]


def neon(*arguments: str) -> list[str]:
    """A `neon` command line of this checkout."""
    return [sys.executable, "-m", "neon", *arguments]
