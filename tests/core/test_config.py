"""A wrong config is refused by name before anything expensive; what is accepted says what the file says."""

import dataclasses
from pathlib import Path

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
        ("synth.num_images=0", "synth.num_images must be >= 1 and <= 4294967296, got 0"),
        ("synth.num_images=many", "synth.num_images: expected a whole number, found 'many'"),
        ("synth.num_images=2.5", "synth.num_images: expected a whole number, found 2.5"),
        ("sampling.uint8=floor", "sampling.uint8: expected one of 'edm', 'truncate', 'round', 'none', found 'floor'"),
        ("finetune.lr=0", "finetune.lr must be > 0 and <= 1000000.0, got 0"),
        ("finetune.ema_power=6.9", "choose one moving average"),
        ("finetune.objective.nois=1", "[finetune.objective] has no key 'nois'"),
        ("select.w=[]", "w must name at least one value"),
        ("select.first_seed=2010", "overlap; they must be disjoint"),
        ("report.extractors={}", "extractors must name at least one"),
        ("colour.red=1", "unknown section or key 'colour'"),
        ("family=nothing", "no family 'nothing'"),
        ("select.metric=other", "select.metric: 'other' is not among report.extractors"),
        ("synth", "expected section.key=value"),
        ("finetune.max_grad_norm=-1", "finetune.max_grad_norm must be > 0, got -1"),
        ("finetune.loss_scale=-1", "finetune.loss_scale must be > 0, got -1"),
        ("finetune.loss_scale=0", "finetune.loss_scale must be > 0, got 0"),
        ("finetune.lr_ramp_images=-1000", "finetune.lr_ramp_images must be >= 0, got -1000"),
        ("finetune.lr_cosine_images=-1", "finetune.lr_cosine_images must be >= 0, got -1"),
        ("finetune.ema_decay=1.5", "finetune.ema_decay must be >= 0 and < 1, got 1.5"),
        ("finetune.weight_decay=-1", "finetune.weight_decay must be >= 0 and <= 1000000.0, got -1"),
        ("finetune.weight_decay=1e300", "finetune.weight_decay must be >= 0 and <= 1000000.0, got 1e+300"),
        ("finetune.betas=[1, 1]", "finetune.betas[0] must be >= 0 and < 1, got 1"),
        ("finetune.betas=[0.9]", "finetune.betas: expected a list [...] of 2 entries, each a number, found [0.9]"),
        ("select.w=0.5", "select.w: expected a list [...] of one or more entries, each a number, found 0.5"),
        ("finetune.eps=-1", "finetune.eps must be > 0 and <= 1000000.0, got -1"),
        ("finetune.eps=inf", "finetune.eps: expected a finite number, found inf"),
        ("finetune.lr=inf", "finetune.lr: expected a finite number, found inf"),
        ("finetune.lr=nan", "finetune.lr: expected a finite number, found nan"),
        ("finetune.seed=-1", "finetune.seed must be >= 0, got -1"),
        ("finetune.images=9223372036854775808", "expected a number of at most 9223372036854775807"),
        ("synth.cfg_scale=inf", "synth.cfg_scale: expected a finite number, found inf"),
        ("select.w=[nan]", "select.w[0]: expected a finite number, found nan"),
        ("select.w=[0.5, 1e300]", "select.w[1] must be >= -1000000.0 and <= 1000000.0, got 1e+300"),
        ("select.w=[1, inf]", "select.w[1]: expected a finite number, found inf"),
        ("select.w=[1, 1.0]", "w must name every value once, got [1.0, 1.0]"),
        ("select.cfg_scale=[]", "cfg_scale must name at least one value"),
        ("select.cfg_scale=[2, 2]", "cfg_scale must name every value once"),
        ("report.num_shown=-1", "report.num_shown must be >= 0, got -1"),
        ("report.num_images=9223372036854775807", "report.num_images must be >= 2 and <= 4294967296"),
        ("select.first_seed=4294967301", "seeds of synth (0 .. 49) and select (4294967301 .. 4294967330) overlap"),
        ("report.first_seed=4294967290", "seeds of synth (0 .. 49) and report (4294967290 .. 4294967329) overlap"),
        ('base.checkpoint=""', "base.checkpoint: expected a text that is not empty"),
        ('base.weights=" "', "base.weights: expected a text that is not empty"),
        ('base.autoencoder=""', "base.autoencoder: expected a text that is not empty"),
        ('base.checkpoint="\\u0000"', r"found '\x00'"),
        ('report.extractors={"" = "a"}', "report.extractors: expected a text that is not empty"),
        ('report.extractors={a = ""}', "report.extractors.a: expected a text that is not empty"),
        ("report.extractors={a = 3}", "report.extractors.a: expected a string, found 3"),
        ("data.size=0", "data.size must be >= 1, got 0"),
        ("data.pad=-1", "data.pad must be >= 0, got -1"),
        ("sampling.cfg_scale=2", "[sampling] cfg_scale changes nothing here; name it where images are made: synth."),
        ("synth.sampling.cfg_scale=2", "[synth.sampling] cfg_scale changes nothing here"),
        ("family=.", "family '.': expected a shipped name"),
        ("family=tests..line:Line", "family 'tests..line:Line': expected a shipped name"),
        ("family=tests.core.line_family:", "family 'tests.core.line_family:': expected a shipped name"),
        ("select.w=" + "[" * 5000 + "]" * 5000, "nested too deep"),
    ],
)
def test_mistakes_are_named(line_config, override, message):
    assert message in refused(line_config, override)


def test_a_config_may_be_based_on_another(line_config, tmp_path):
    own = line_config.with_name("own.toml")
    own.write_text(f'based_on = "{line_config.name}"\n[sampling]\nspread = 0.5\n[finetune.objective]\nnoise = 0.7\n')
    expected = load(line_config, ["sampling.spread=0.5", "finetune.objective.noise=0.7", "report.num_images=60"])
    assert load(own, ["report.num_images=60"]) == expected
    line_config.with_name("third.toml").write_text('based_on = "own.toml"\n')
    assert "own.toml': that config is based on another one" in refused(line_config.with_name("third.toml"))
    own.write_text('based_on = "nowhere.toml"\n')
    with pytest.raises(FileNotFoundError, match=r"own.toml: based_on = 'nowhere.toml': there is no config"):
        load(own)


@pytest.mark.parametrize("name", ["", "/", "..", "no/such.toml", "\\u0000", "/no/such.toml"])
def test_a_config_based_on_nothing_is_named(line_config, name):
    line_config.write_text(f'based_on = "{name}"\n' + line_config.read_text())
    with pytest.raises(FileNotFoundError, match=r"line\.toml: based_on = .*: there is no config"):
        load(line_config)


def test_a_name_that_is_almost_right_is_suggested(line_config):
    assert "[sampling] has no key 'spred' (did you mean 'spread'?)" in refused(line_config, "sampling.spred=1")
    path = Path(__file__).resolve().parents[2] / "configs" / "imm_imagenet256_t8.toml"
    renamed = refused(path, "finetune.objective.label_dropout=0.1")
    assert "[finetune.objective] has no key 'label_dropout' (did you mean 'label_drop'?)" in renamed


def test_a_missing_key_and_a_missing_file(line_config, tmp_path):
    line_config.write_text(line_config.read_text().replace('uint8 = "round"\n', ""))
    assert "[sampling] needs the key 'uint8'" in refused(line_config)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        load(tmp_path / "nowhere.toml")
    with pytest.raises(ValueError, match=r"no \[train\] section"):
        load(line_config, ["sampling.uint8=round"]).need("train", Training)


def test_a_wrong_value_is_named_before_a_missing_key(line_config):
    """As --set gives a section in part."""
    assert "train.lr must be > 0 and <= 1000000.0, got -1" in refused(line_config, "train.lr=-1")
    assert "[train] needs the key 'images'" in refused(line_config, "train.lr=1")
    assert "synth.sampling.spread: expected a number" in refused(line_config, "synth.sampling.spread=wide")


def test_ranges_hold_for_options_that_a_program_makes(line_config):
    with pytest.raises(ValueError, match="loss_scale must be > 0, got -1"):
        Training(images=1, batch=1, lr=1, loss_scale=-1)
    with pytest.raises(ValueError, match="first_seed must be >= 0"):
        dataclasses.replace(load(line_config).synth, first_seed=-1)


def test_seeds_that_only_touch_across_the_border_are_disjoint(line_config):
    """Blocks end at 2^32 - 1 and begin at 2^32, which is seed 0 again."""
    assert load(line_config, ["select.first_seed=4294967266"]).select.first_seed == 2**32 - 30
    assert "overlap" in refused(line_config, "select.first_seed=4294967267")
    assert load(line_config, ["report.first_seed=4294967346"]).report.first_seed == 2**32 + 50
    assert "overlap" in refused(line_config, "report.first_seed=4294967345")


def test_a_file_that_is_no_utf_8_and_one_nested_too_deep_are_named(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes('family = "caf\xe9"'.encode("latin-1"))
    assert f"{path}: not valid TOML in UTF-8" in refused(path)
    path.write_text("family = " + "[" * 5000 + "]" * 5000)
    assert f"{path}: its arrays or tables are nested too deep" in refused(path)


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"], ids=["bytes", "text"])
@pytest.mark.parametrize("name", ["neon.safetensors", "net.pkl", "ours.pth"])
def test_a_checkpoint_in_the_place_of_a_config_is_said(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    said = refused(tmp_path / name)
    assert f"{tmp_path / name}: a config (.toml) is expected, this is a checkpoint; `neon info " in said


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
