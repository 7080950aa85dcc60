"""What the five families have in common: their files, and messages that name a key once."""

from pathlib import Path

import pytest

from neon.config_table import build
from neon.family import resolve
from neon.own_code import shipped

ROOT = Path(__file__).resolve().parents[1]
FLOOR_PLAN = ("README", "family", "options", "sampler", "loss", "load", "presets", "calculate_fid")


@pytest.mark.parametrize("name", shipped())
def test_every_family_has_the_same_files(name):
    files = {file.stem for file in (ROOT / name).iterdir()}
    assert [part for part in FLOOR_PLAN if part not in files] == []


@pytest.mark.parametrize("name", shipped())
def test_options_live_in_options(name):
    family = resolve(name)
    kinds = [family.sampling, family.objective]
    if family.trainable_autoencoder is not None:
        kinds.append(family.trainable_autoencoder.objective)
    assert {kind.__module__ for kind in kinds} == {f"{name}.options"}
    assert [kind.__name__ for kind in kinds] == ["Sampling", "Objective", "AutoencoderObjective"][: len(kinds)]


@pytest.mark.parametrize("name", shipped())
def test_a_wrong_option_is_named_once(name):
    """The section stands in front of a message; the message itself names the key only."""
    mistakes = {
        "sampling": [
            {"num_steps": 0},
            {"rho": 0.0},
            {"sigma_min": 90.0},
            {"tol": 0.0},
            {"top_k": -1},
            {"cfg_scale": -1.0},
        ],
        "objective": [{"label_drop": 2.0}, {"augment": 2.0}, {"flip": 2.0}, {"sigma": -1.0}, {"group_size": 1}],
    }
    found = []
    for where, kind in (("sampling", resolve(name).sampling), ("objective", resolve(name).objective)):
        for mistake in mistakes[where]:
            if mistake.keys() <= kind.__dataclass_fields__.keys():
                try:
                    build(kind, mistake, where)
                except ValueError as error:
                    found.append(str(error))
    assert found
    assert [message for message in found if message.count("sampling") + message.count("objective") != 1] == []


def test_the_five_commands_begin_alike():
    """They run uninstalled, started as a file from any folder."""
    heads = set()
    for name in shipped():
        code = (ROOT / name / "calculate_fid.py").read_text().split("from __future__ import annotations\n")[1]
        heads.add(code.partition(".parents[1])")[0])
    assert len(heads) == 1
