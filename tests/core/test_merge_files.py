"""`neon merge` and `neon convert` on files as people have them: what is taken, what is written, what is refused."""

import json
import os
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

from neon.checkpoints import checkpoint
from neon.cli.main import main
from neon.merge import reverse_merge
from tests.core.line_family import Line


def neon(*args: object) -> dict:
    """The JSON line of a command; a failed one raises with its message."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exit_code != 0:
        assert isinstance(result.exception, SystemExit), result.exception  # no traceback
        raise ValueError(result.output)
    return json.loads(result.output.splitlines()[-1])


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model(torch.randn(50, 3) * (1 + seed))
    return model


BASE, SYNTH = network(0).state_dict(), network(1).state_dict()


def saved(path: Path, value: object) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(value, path, metadata={"format": "pt"})
    else:
        torch.save(value, path)
    return path


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return saved(tmp_path / "base.pth", BASE), saved(tmp_path / "synth.pth", SYNTH)


def test_batch_norm_of_a_bare_state_dict_keeps_its_statistics(tmp_path, pair):
    out = tmp_path / "out.safetensors"
    about = neon("merge", *pair, "--w", 2, "--out", out)
    merged = safetensors.torch.load_file(out)
    parameters = [name for name, _ in network(0).named_parameters()]
    assert_same(merged, reverse_merge(BASE, SYNTH, 2.0, parameters=parameters))
    assert (merged["1.running_var"] > 0).all()
    moved = torch.cat([(SYNTH[name] - BASE[name]).flatten() for name in parameters]).norm()
    size = torch.cat([BASE[name].flatten() for name in parameters]).norm()
    assert about["relative_step"] == pytest.approx((moved / size).item(), rel=1e-5)


@pytest.mark.parametrize("family", ["this:d", "antigravity:x", "my_model:MyFamily"])
def test_a_file_does_not_decide_what_is_imported(tmp_path, family, monkeypatch):
    (tmp_path / "my_model.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name, tensors in (("base", BASE), ("synth", SYNTH)):
        metadata = {"family": family, "arch": {"x": 1}}
        checkpoint.write(tmp_path / f"{name}.safetensors", tensors, metadata=metadata)
    files = tmp_path / "base.safetensors", tmp_path / "synth.safetensors"
    neon("merge", *files, "--w", 1, "--out", tmp_path / "out.safetensors")
    assert family.partition(":")[0] not in sys.modules
    assert checkpoint.read(tmp_path / "out.safetensors").family == family


def test_a_network_that_cannot_be_built_here_is_merged_by_its_own_names(tmp_path):
    for arch in ({"unknown": 1}, {"depth": 10**7}, {"depth": "x"}):
        for name, tensors in (("base", BASE), ("synth", SYNTH)):
            checkpoint.write(tmp_path / f"{name}.safetensors", tensors, metadata={"family": "var", "arch": arch})
        files = tmp_path / "base.safetensors", tmp_path / "synth.safetensors"
        neon("merge", *files, "--w", 1, "--out", tmp_path / "out.safetensors")
        found = checkpoint.read(tmp_path / "out.safetensors")
        assert found.arch == arch
        assert_same(dict(found.tensors), reverse_merge(BASE, SYNTH, 1.0))


def test_an_average_beside_weights_of_no_known_kind_is_said(tmp_path, pair, caplog):
    """A bare state dict and a training state with an average: what an average lags behind is no self-training."""
    both = saved(tmp_path / "both.pth", {"ema": SYNTH, "model": BASE})
    out = tmp_path / "out.safetensors"
    neon("merge", pair[0], both, "--w", 1, "--out", out)
    assert_same(safetensors.torch.load_file(out), reverse_merge(BASE, SYNTH, 1.0))  # the average, as before
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{pair[0]} does not say whether its weights are an average, of {both} the average")
    caplog.clear()
    neon("merge", pair[0], both, "--w", 1, "--base-weights", "ema", "--synth-weights", "ema", "--out", out)
    assert not caplog.records


def test_weight_sets_by_default_and_by_name(tmp_path):
    half = {name: value * 0.5 if value.is_floating_point() else value for name, value in BASE.items()}
    both = saved(tmp_path / "both.pth", {"ema": BASE, "model": half})
    raw = saved(tmp_path / "raw.pth", {"model": SYNTH})
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"gives its 'ema' weights and .* its 'raw' weights.*--synth-weights"):
        neon("merge", both, raw, "--w", 1, "--out", out)
    neon("merge", both, raw, "--w", 1, "--base-weights", "raw", "--out", out)
    assert_same(safetensors.torch.load_file(out), reverse_merge(half, SYNTH, 1.0))
    neon("merge", both, raw, "--w", 1, "--base-weights", "ema", "--synth-weights", "raw", "--out", out)
    assert_same(safetensors.torch.load_file(out), reverse_merge(BASE, SYNTH, 1.0))
    with pytest.raises(ValueError, match=r"no 'ema' weights.*Ask for one of these with --synth-weights"):
        neon("merge", both, raw, "--w", 1, "--weights", "ema", "--out", out)
    checkpoint.write(tmp_path / "trained.safetensors", BASE, metadata={"weights": "raw"})  # as `neon train` writes
    neon("merge", tmp_path / "trained.safetensors", raw, "--w", 1, "--out", out)
    neon("convert", tmp_path / "trained.safetensors", "--out", tmp_path / "again.safetensors")


LAYOUTS = {
    "timm": ({"state_dict": SYNTH, "state_dict_ema": BASE, "optimizer": {"state": {0: {"m": torch.ones(1)}}}}, "ema"),
    "BasicSR": ({"params": SYNTH, "params_ema": BASE}, "params_ema"),
    "GAN": ({"g": SYNTH, "d": {"x": torch.ones(1)}, "g_ema": BASE, "latent_avg": torch.ones(3)}, "ema"),
    "trainer": ({"model_state_dict": SYNTH, "ema_model_state_dict": BASE}, "ema"),
    "DeepSpeed": ({"module": BASE, "optimizer": {"w": torch.ones(1)}, "global_steps": 3}, "raw"),
    "container": ({"unet": BASE, "vae": {"x": torch.ones(1)}}, "unet"),
    "LitEma": (
        {
            "state_dict": {f"model.{name}": value for name, value in SYNTH.items()}
            | {f"model_ema.{name.replace('.', '')}": value for name, value in BASE.items()}
            | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(5)}
        },
        "ema",
    ),
    "mmdetection": (
        {
            "meta": {"epoch": 3},
            "state_dict": SYNTH | {f"ema_{name.replace('.', '_')}": value for name, value in BASE.items()},
        },
        "ema",
    ),
    "shadow list": (
        {
            "model": {**BASE, **{name: value + 1 for name, value in BASE.items() if "running" not in name}},
            "ema": {
                "decay": 0.999,
                "num_updates": 10,
                "shadow_params": [BASE[name] for name, _ in network(0).named_parameters()],
            },
        },
        "ema",
    ),
    "beside other things": ({**BASE, "_extra_state": None, "steps": 7, "note": "x", "nothing": None}, "any"),
    "AveragedModel": ({"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in BASE.items()}, "any"),
    "FSDP": ({f"_fsdp_wrapped_module.{k}": v for k, v in BASE.items()}, "any"),
    "checkpointed": ({k.replace("0.", "0._checkpoint_wrapped_module._orig_mod."): v for k, v in BASE.items()}, "any"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_other_trainers(tmp_path, layout):
    content, weights = LAYOUTS[layout]
    path = saved(tmp_path / "a.pth", content)
    found = dict(checkpoint.read(path, weights=weights).tensors)
    if layout == "LitEma":
        found = {name.removeprefix("model."): value for name, value in found.items()}
    if layout == "shadow list":
        found["1.num_batches_tracked"] = BASE["1.num_batches_tracked"]
    assert_same(found, BASE)
    neon("info", path)
    if layout != "container":
        assert checkpoint.read(path, weights="auto").weights in ("ema", "raw", "unnamed")


def test_sets_of_one_name_are_told_by_their_place(tmp_path):
    path = saved(tmp_path / "a.pth", {"ema": BASE, "model_ema": SYNTH})
    with pytest.raises(ValueError, match=r"two sets of ema weights, ema and model_ema.*'/ema' or '/model_ema'"):
        checkpoint.read(path)
    assert_same(dict(checkpoint.read(path, weights="/ema").tensors), BASE)
    assert_same(dict(checkpoint.read(path, weights="/model_ema").tensors), SYNTH)
    with pytest.raises(ValueError, match=r"'unet' \(under unet\), 'vae'"):
        checkpoint.read(saved(tmp_path / "b.pth", {"unet": BASE, "vae": SYNTH}), weights="auto")


def test_averages_that_do_not_fit_are_refused_when_they_are_asked_for(tmp_path):
    path = saved(tmp_path / "a.pth", {"model": BASE, "ema": {"shadow_params": [torch.ones(2)]}})
    assert_same(dict(checkpoint.read(path, weights="raw").tensors), BASE)
    with pytest.raises(ValueError, match="cannot be used: 1 averages do not fit the 6 parameters"):
        checkpoint.read(path, weights="ema")
    lost = {"model.a": torch.ones(1), "model_ema.b": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 averages belong to no weight; first: model_ema\.b"):
        checkpoint.read(saved(tmp_path / "b.pth", lost), weights="ema")


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
@pytest.mark.parametrize("command", ["merge", "convert"])
def test_an_input_is_never_replaced(tmp_path, command, link):
    base, synth = (saved(tmp_path / f"{name}.safetensors", value) for name, value in (("base", BASE), ("synth", SYNTH)))
    before = base.read_bytes(), synth.read_bytes()
    for victim in (base, synth) if command == "merge" else (base,):
        out = victim
        if link is not None:
            out = tmp_path / f"link-to-{victim.name}"
            link(victim, out)
        given = (base, synth, "--w", 1, "--out", out) if command == "merge" else (base, "--out", out)
        with pytest.raises(ValueError, match="is the same file as the input"):
            neon(command, *given)
    assert (base.read_bytes(), synth.read_bytes()) == before


def test_a_shard_of_an_input_is_never_replaced(tmp_path, pair):
    saved(tmp_path / "shard.safetensors", BASE)
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(BASE, "shard.safetensors")}))
    with pytest.raises(ValueError, match=r"same file as the input .*shard\.safetensors"):
        neon("merge", index, pair[1], "--w", 1, "--out", tmp_path / "shard.safetensors")


def test_what_may_be_written(tmp_path, pair):
    with pytest.raises(ValueError, match=r"expected a name ending in \.safetensors"):
        neon("merge", *pair, "--w", 1, "--out", tmp_path / "out.pth")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match="a device or a pipe"):
        neon("merge", *pair, "--w", 1, "--out", tmp_path / "pipe.safetensors")
    assert (tmp_path / "pipe.safetensors").is_fifo()


def test_metadata_of_a_hugging_face_file_stays_and_ours_is_beside_it(tmp_path):
    files = [tmp_path / "base.safetensors", tmp_path / "synth.safetensors"]
    for path, tensors in zip(files, (BASE, SYNTH), strict=True):
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "license": "mit"})
    out = tmp_path / "out.safetensors"
    neon("merge", *files, "--w", 1.5, "--out", out)
    with safetensors.safe_open(out, framework="pt") as file:
        texts = file.metadata()
    assert (texts["format"], texts["license"]) == ("pt", "mit")
    assert json.loads(texts["neon"])["w"] == 1.5
    assert neon("info", out)["weights"]["unnamed"]["meta"]["w"] == 1.5
    neon("convert", files[0], "--out", tmp_path / "converted.safetensors")
    assert_same(dict(checkpoint.read(tmp_path / "converted.safetensors").tensors), BASE)


@pytest.mark.parametrize("texts", [{"neon": '{"format": 7}'}, {"neon": "[]"}, {"neon": "x"}])
def test_an_old_output_stays_where_the_new_one_fails(tmp_path, texts):
    safetensors.torch.save_file({}, tmp_path / "odd.safetensors", metadata=texts)
    out = saved(tmp_path / "out.safetensors", BASE)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"odd\.safetensors"):
        neon("convert", tmp_path / "odd.safetensors", "--out", out)
    assert out.read_bytes() == before


def test_ties_of_the_base_that_the_other_model_broke_are_not_kept(tmp_path):
    shared = torch.ones(2, 2)
    base = saved(tmp_path / "base.pth", {"a": shared, "b": shared})
    synth = saved(tmp_path / "synth.pth", {"a": torch.zeros(2, 2), "b": torch.full((2, 2), 3.0)})
    out = tmp_path / "out.safetensors"
    neon("merge", base, synth, "--w", 1, "--out", out)
    merged = checkpoint.read(out).tensors
    assert merged["a"].unique().tolist() == [2.0]
    assert merged["b"].unique().tolist() == [-1.0]
    other = torch.zeros(2, 2)
    saved(synth, {"a": other, "b": other})
    neon("merge", base, synth, "--w", 1, "--out", out)
    assert checkpoint.read(out).tensors.aliases == {"b": "a"}


class Twice(Line):
    """One layer under two names."""

    def build(self, arch):
        layer = nn.Linear(2, 2)
        return nn.ModuleDict({"first": layer, "again": layer, "norm": nn.BatchNorm1d(2)})


def test_a_network_that_is_built_moves_tied_weights_under_both_names(tmp_path):
    for name, seed in (("base", 0), ("synth", 1)):
        torch.manual_seed(seed)
        state = Twice().build({}).state_dict()
        checkpoint.write(tmp_path / f"{name}.safetensors", state, metadata={"arch": {}})
    files = tmp_path / "base.safetensors", tmp_path / "synth.safetensors"
    out, family = tmp_path / "out.safetensors", "tests.core.test_merge_files:Twice"
    about = neon("merge", *files, "--w", 2, "--out", out, "--family", family)
    base, synth, merged = (checkpoint.read(path).tensors for path in (*files, out))
    assert about["parameters"] == 6
    assert_same(dict(merged), reverse_merge(base, synth, 2))
    assert merged.aliases == {"again.weight": "first.weight", "again.bias": "first.bias"}
    network = Twice().build({})
    network.load_state_dict(dict(merged))
    torch.testing.assert_close(
        network["first"].weight, nn.Parameter(base["first.weight"] - 2 * (synth["first.weight"] - base["first.weight"]))
    )


@pytest.mark.parametrize("view", ["conj", "neg", "imag"])
def test_conjugate_and_negative_views_keep_their_signs(tmp_path, view):
    z = torch.tensor([1 + 2j, 3 - 4j])
    value = {"conj": z.conj(), "neg": z.conj().imag, "imag": z.imag}[view]
    path = saved(tmp_path / "a.pth", {"x": value})
    assert torch.equal(checkpoint.read(path).tensors["x"], value)
    neon("convert", path, "--out", tmp_path / "a.safetensors")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a.safetensors")["x"], value)


@pytest.mark.parametrize("ours", ["base", "synth"])
def test_a_wrappers_prefix_alone_keeps_no_file_from_the_other(tmp_path, ours):
    """Of foreign files it is dropped, our own keep their names: they were called different networks."""
    states = {"base": BASE, "synth": SYNTH}
    files = {name: saved(tmp_path / f"{name}.pth", state) for name, state in states.items()}
    files[ours] = tmp_path / "ours.safetensors"
    wrapped = {f"module.{name}": value for name, value in states[ours].items()}
    checkpoint.write(files[ours], wrapped, metadata={"family": "line", "weights": "unnamed"})
    neon("merge", files["base"], files["synth"], "--w", 1.5, "--out", tmp_path / "out.safetensors")
    expected = reverse_merge(BASE, SYNTH, 1.5)
    prefix = "module." if ours == "base" else ""
    assert_same(
        safetensors.torch.load_file(tmp_path / "out.safetensors"),
        {prefix + name: value for name, value in expected.items()},
    )


def test_a_learned_mask_and_step_move_and_a_counter_stays(tmp_path):
    """Their names alone say that they are buffers; they were the base's, and nothing said so."""
    base = {"p": torch.ones(3), "learned.mask": torch.rand(4), "lsq.step": torch.tensor([0.02]), "step": torch.ones(())}
    synth = {"p": torch.zeros(3), "learned.mask": torch.rand(4), "lsq.step": torch.tensor([0.03])}
    files = saved(tmp_path / "base.pth", base), saved(tmp_path / "synth.pth", {**synth, "step": torch.tensor(65.0)})
    assert neon("merge", *files, "--w", 1.0, "--out", tmp_path / "out.safetensors")["parameters"] == 3
    expected = {name: 2 * base[name] - value for name, value in synth.items()} | {"step": torch.ones(())}
    torch.testing.assert_close(safetensors.torch.load_file(tmp_path / "out.safetensors"), expected)


def test_one_element_with_a_stride_and_masks_with_infinities(tmp_path):
    mask = torch.full((2, 2), -torch.inf).triu(1)
    base = {"one": torch.arange(10.0)[3::7][:1], "mask": mask, "p": torch.ones(3)}
    synth = {"one": torch.tensor([5.0]), "mask": mask.clone(), "p": torch.zeros(3)}
    assert base["one"].stride() == (7,)
    files = saved(tmp_path / "base.pth", base), saved(tmp_path / "synth.pth", synth)
    about = neon("merge", *files, "--w", 1, "--out", tmp_path / "out.safetensors")
    assert about["relative_step"] == pytest.approx((7 / 12) ** 0.5)
    assert safetensors.torch.load_file(tmp_path / "out.safetensors")["one"].tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_files(tmp_path, dtype):
    for name, values in (("base", [1.0, 2.0]), ("synth", [2.0, 2.0])):
        checkpoint.write(tmp_path / f"{name}.safetensors", {"p": torch.tensor(values).to(dtype)}, metadata={})
    files = tmp_path / "base.safetensors", tmp_path / "synth.safetensors"
    neon("merge", *files, "--w", 0.5, "--out", tmp_path / "out.safetensors")
    assert checkpoint.read(tmp_path / "out.safetensors").tensors["p"].float().tolist() == [0.5, 2.0]


def test_a_base_of_zeros_is_not_said_to_be_the_same(tmp_path, caplog):
    base = saved(tmp_path / "base.pth", {"a": torch.zeros(4)})
    synth = saved(tmp_path / "synth.pth", {"a": torch.full((4,), 0.5)})
    about = neon("merge", base, synth, "--w", 1, "--out", tmp_path / "out.safetensors")
    assert about["relative_step"] == 1.0
    assert "the same numbers" not in caplog.text


def test_keep_base_with_names_in_one_file_only(tmp_path):
    base = saved(tmp_path / "base.pth", {"a": torch.ones(2), "only": torch.ones(1)})
    synth = saved(tmp_path / "synth.pth", {"a": torch.zeros(2), "other": torch.ones(1)})
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="first: only, other"):
        neon("merge", base, synth, "--w", 1, "--out", out)
    assert not out.exists()
    about = neon("merge", base, synth, "--w", 1, "--on-mismatch", "keep_base", "--out", out)
    assert about["relative_step"] == 1.0
    assert safetensors.torch.load_file(out)["a"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("base", "synth", "said"),
    [
        ("base", "synth", ""),
        ("synth", "base", "are they swapped? The base comes first: neon merge BASE SYNTH"),
        ("base", "base", "hold the same numbers: the result is BASE, whatever w is"),
        ("other", "synth", "synth.safetensors says that it was made from another base than"),
        ("base", "neon", "neon.safetensors is itself the result of a merge (w = 0.5), no self-trained model"),
        ("base", "there", ""),
    ],
)
def test_files_that_hardly_belong_together_in_this_order_are_a_warning(tmp_path, base, synth, said):
    """As `neon finetune` writes its snapshots: with the hash of their base."""
    weights = {"base": BASE, "other": network(2).state_dict(), "synth": SYNTH}
    for name in ("base", "other"):
        checkpoint.write(tmp_path / f"{name}.safetensors", weights[name], metadata={"weights": "raw"})
    origin = checkpoint.read(tmp_path / "base.safetensors", weights="raw").sha256
    checkpoint.write(tmp_path / "synth.safetensors", SYNTH, metadata={"weights": "raw", "base_sha256": origin})
    for name, w in (("neon", 0.5), ("there", -1.0)):  # at -1 it is the self-trained model
        metadata = {"weights": "raw", "base_sha256": origin, "w": w}
        checkpoint.write(tmp_path / f"{name}.safetensors", reverse_merge(BASE, SYNTH, w), metadata=metadata)
    files = [tmp_path / f"{name}.safetensors" for name in (base, synth)]
    done = CliRunner().invoke(main, ["merge", *map(str, files), "--w", "1", "--out", str(tmp_path / "out.safetensors")])
    assert done.exit_code == 0, done.output
    assert (said in done.stderr) if said else ("warning" not in done.stderr), done.stderr
