"""A wrong config is refused by name before anything expensive; what is accepted says what the file says."""

import dataclasses

import pytest

from neon.pipeline.experiment import load
from neon.training.recipe import Training
from neon.training.schedules import ema_beta, lr_at


def refused(config, *overrides) -> str:
    with pytest.raises(ValueError, match=r".+") as error:
        load(config, overrides)
    return str(error.value)


def test_values_arrive(line_config):
    config = load(line_config, ["sampling.spread=0.5", "select.w=[1, 2.5]", "finetune.objective.noise=0.7"])
    assert config.sampling.options.spread == 0.5
    assert config.select.w == (1.0, 2.5)
    assert config.finetune.objective.noise == 0.7
    assert config.report.cfg_scale == "selected"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.synth.num_images = 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("synth.num_image=5", r"[synth] has no key 'num_image'"),
        ("sampling.steps=5", r"[sampling] has no key 'steps'"),
        ("synth.num_images=0", "[synth] num_images must be >= 1, got 0"),
        ("synth.num_images=many", "synth.num_images: expected a whole number, found 'many'"),
        ("synth.num_images=2.5", "synth.num_images: expected a whole number, found 2.5"),
        ("sampling.uint8=floor", "sampling.uint8: expected one of 'edm', 'truncate', 'round', found 'floor'"),
        ("finetune.lr=0", "[finetune] lr must be > 0"),
        ("finetune.ema_power=6.9", "choose one moving average"),
        ("finetune.objective.nois=1", "[finetune.objective] has no key 'nois'"),
        ("select.w=[]", "w must name at least one value"),
        ("select.first_seed=2010", "overlap; they must be disjoint"),
        ("report.extractors={}", "extractors must name at least one"),
        ("colour.red=1", "unknown section or key 'colour'"),
        ("family=nothing", "no family 'nothing'"),
        ("select.metric=other", "select.metric: 'other' is not among report.extractors"),
        ("synth", "expected section.key=value"),
    ],
)
def test_mistakes_are_named(line_config, override, message):
    assert message in refused(line_config, override)


def test_a_missing_key_and_a_missing_file(line_config, tmp_path):
    line_config.write_text(line_config.read_text().replace('uint8 = "round"\n', ""))
    assert "[sampling] needs the key 'uint8'" in refused(line_config)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        load(tmp_path / "nowhere.toml")
    with pytest.raises(ValueError, match=r"no \[train\] section"):
        load(line_config, ["sampling.uint8=round"]).need("train", Training)


def test_rates_at_their_corners():
    ramp = Training(images=1000, batch=10, lr=2.0, lr_ramp_images=100, lr_cosine_images=400)
    assert [lr_at(ramp, seen) for seen in (0, 50, 100, 600)] == [0, 1, 2, 2]
    assert lr_at(ramp, 800) == pytest.approx(1.0)
    assert lr_at(ramp, 1000) == pytest.approx(0.0)
    long_ramp = Training(images=6_000_000, batch=512, lr=1e-4, lr_ramp_images=10_000_000)
    assert lr_at(long_ramp, 6_000_000) == pytest.approx(6e-5)  # EDM's ramp never ends within the budget


def test_moving_averages_at_their_corners():
    assert ema_beta(Training(images=1, batch=1, lr=1, ema_decay=0.9999), 123, 7) == 0.9999
    half = Training(images=1, batch=500, lr=1, ema_halflife_images=500)
    assert ema_beta(half, 0, 0) == 0.5
    ramped = Training(images=1, batch=500, lr=1, ema_halflife_images=500_000, ema_rampup_ratio=0.05)
    assert ema_beta(ramped, 0, 0) == pytest.approx(0)  # starts at the current weights
    assert ema_beta(ramped, 200_000, 400) == pytest.approx(0.5 ** (500 / 10_000))
    power = Training(images=1, batch=1, lr=1, ema_power=6.94)
    assert ema_beta(power, 0, 0) == 0
    assert ema_beta(power, 0, 99) == pytest.approx(0.99**7.94)
