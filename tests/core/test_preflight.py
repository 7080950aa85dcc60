"""What is wrong with a config, its files or its sections together is said before anything is made."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from neon.pipeline.evaluate_base import evaluate_base
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.pipeline.train_base import train_base
from neon.runtime.distributed import World
from tests.core.line_family import Line, Sampling


class Pairs(Line):
    """Losses of two images belong together."""

    def group(self, how: object) -> int:
        return 2


@dataclass(frozen=True, kw_only=True)
class NotNegative(Sampling):
    def __post_init__(self) -> None:
        if self.cfg_scale < 0:
            raise ValueError(f"cfg_scale must be >= 0, got {self.cfg_scale}")


class Guided(Line):
    """As VAR, it takes no negative guidance."""

    sampling = NotNegative


class Encoding(Line):
    """Training reads codes: the images as floats."""

    def encode(self, images):
        return images.float() / 127.5 - 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["report.cfg_scale=1.1"], r"report\.cfg_scale: no w is searched at 1\.1, select\.cfg_scale is \[1\.0, 1\.2\]"),
        (["finetune.arch={num_classes = 4}"], r"finetune\.arch: .*mean"),
        (["finetune.arch={width = 4}"], r"finetune\.arch: .*width"),
        (
            ["finetune.batch=15", "family=tests.core.test_preflight:Pairs"],
            r"finetune\.batch must be a multiple of 2.*15",
        ),
        (
            ["select.cfg_scale=[-0.5, 1.2]", "family=tests.core.test_preflight:Guided"],
            r"select\.cfg_scale: cfg_scale must be >= 0, got -0\.5",
        ),
        (["finetune.micro_batch=3", "family=tests.core.test_preflight:Pairs"], r"finetune\.micro_batch must be a mult"),
    ],
)
def test_sections_that_do_not_fit_are_refused_before_any_image(line_config, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        Run(load(line_config, overrides), tmp_path / "run", World()).all()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("section", ["select", "report"])
def test_a_guided_family_needs_its_scale_in_every_section(line_config, tmp_path, section):
    text = line_config.read_text()
    value = "cfg_scale = [1.0, 1.2]\n" if section == "select" else 'cfg_scale = "selected"\n'
    assert value in text
    line_config.write_text(text.replace(value, "").replace('"selected"', "1.0"))
    with pytest.raises(ValueError, match=rf"{section}\.cfg_scale: this family is guided"):
        Run(load(line_config), tmp_path / "run", World()).all()
    assert not (tmp_path / "run").exists()


def test_all_absent_sections_are_named_at_once(line_config, tmp_path):
    text = line_config.read_text()
    line_config.write_text(text[: text.index("[select]")])
    with pytest.raises(ValueError, match=r"no \[select\] and no \[report\] section"):
        Run(load(line_config), tmp_path / "run", World()).all()
    assert not (tmp_path / "run").exists()


def test_eval_takes_a_scale_that_is_not_searched(line_config, tmp_path):
    found = evaluate_base(Run(load(line_config, ["report.cfg_scale=1.1"]), tmp_path / "eval", World()), 1)
    assert found["value"] > 0


def training(line_config: Path, tmp_path: Path, family: str = "tests.core.line_family:Line") -> Path:
    write_images(tmp_path, seed=0)
    real = (
        f'[model]\nnum_classes = 3\n[data]\npath = "{tmp_path}/real.npz"\n[train]\nimages = 16\nbatch = 8\nlr = 0.1\n'
    )
    line_config.write_text(line_config.read_text().replace("tests.core.line_family:Line", family) + real)
    return line_config


def write_images(folder: Path, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (40, 4, 4), np.uint8)
    np.savez(folder / "real.npz", images=images, labels=np.arange(40) % 3)


@pytest.mark.parametrize("family", ["tests.core.line_family:Line", "tests.core.test_preflight:Encoding"])
def test_training_does_not_go_on_with_other_images_of_the_same_name(line_config, tmp_path, family):
    config = load(training(line_config, tmp_path, family))
    train_base(config, tmp_path / "base", World())
    train_base(config, tmp_path / "base", World())
    write_images(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"begun with another setting: data_sha256"):
        train_base(config, tmp_path / "base", World())


def test_training_does_not_go_on_with_an_edited_family(line_config, tmp_path, monkeypatch):
    config = load(training(line_config, tmp_path))
    train_base(config, tmp_path / "base", World())
    monkeypatch.setattr("neon.pipeline.train_base.source_sha256", lambda kind: "edited")
    with pytest.raises(ValueError, match=r"begun with another setting: family_source"):
        train_base(config, tmp_path / "base", World())


def test_groups_are_checked_before_the_images_are_opened(line_config, tmp_path):
    config = training(line_config, tmp_path, "tests.core.test_preflight:Pairs")
    (tmp_path / "real.npz").unlink()
    with pytest.raises(ValueError, match=r"train\.batch must be a multiple of 2"):
        train_base(load(config, ["train.batch=7"]), tmp_path / "base", World())
