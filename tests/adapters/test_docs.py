"""The config of docs/diffusers.md and those of configs/ are read as they stand there."""

import json
import re
import tomllib

import pytest

from neon.pipeline.experiment import load, parse
from tests.adapters.pipelines import diffusers  # noqa: F401 - skips without the extra
from tests.commands import ROOT


def test_the_documented_config_is_one():
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/diffusers.md").read_text(), re.S)
    found = parse(tomllib.loads(block))
    assert found.base.checkpoint == "hf://google/ddpm-cifar10-32"
    assert found.sampling.options.scheduler == "DDIMScheduler"


@pytest.mark.parametrize("kind", ["ddim", "flow"])
def test_the_examples_are_read(kind):
    assert load(ROOT / f"configs/diffusers_{kind}.toml").base.checkpoint == f"runs/diffusers_{kind}_base"


@pytest.mark.parametrize("kind", ["ddim", "flow"])
def test_the_committed_results_show_what_the_page_says(kind):
    result = json.loads((ROOT / "results/diffusers_fashion.json").read_text())[kind]
    values = {name: row["metrics"][result["metric"]] for name, row in result["rows"].items()}
    assert values["neon"] < 0.7 * values["base"] < values["self-trained"]
    assert values["neon"] < 0.7 * values["random direction"]
    page = (ROOT / "docs/diffusers.md").read_text()
    for value in values.values():
        assert f"{value:.1f}" in page
