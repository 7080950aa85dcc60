"""The example of docs/own_model.md, run as it stands there: train a base, then the whole of Neon."""

import hashlib
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from neon.checkpoints import checkpoint
from neon.cli.main import main
from neon.own_code import source_sha256
from neon.pipeline import train_base
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.runtime.distributed import World
from tests.commands import invoke, last_object
from tests.core.line_family import Line

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "own_model.md").read_text()


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", DOC, re.S)[1]


def test_the_example_is_short():
    code = [line for line in block("python").split("class Mine")[1].splitlines() if line.strip()]
    assert len(code) <= 30


def test_the_document_shows_the_files_that_neon_example_writes():
    for language, name in (("python", "mine.py"), ("toml", "mine.toml")):
        assert block(language) == (ROOT / "neon/example" / name).read_text()


def test_what_is_there_is_never_replaced(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first/mine.toml").write_text("mine")
    done = invoke(main, "example", "--out", tmp_path / "first")
    assert done.exit_code == 1
    assert "mine.toml is there already" in done.stderr
    assert [path.name for path in (tmp_path / "first").iterdir()] == ["mine.toml"]


def test_a_family_that_is_not_there_is_said_with_where_it_may_lie(tmp_path):
    (tmp_path / "mine.toml").write_text('family = "not_mine:Mine"')
    done = invoke(main, "check", tmp_path / "mine.toml")
    assert done.exit_code == 1
    assert "there is no module 'not_mine'" in done.stderr
    assert "in a file beside the config or on PYTHONPATH" in done.stderr


def test_the_example_runs_from_training_to_merged_file(tmp_path):
    """As installed, without PYTHONPATH for the config's folder: mine.py lies beside the config."""
    assert invoke(main, "example", "--out", tmp_path / "first").exit_code == 0
    tmp_path = tmp_path / "first"

    def neon(*arguments: str) -> dict:
        command = [sys.executable, "-m", "neon", *arguments, "--device", "cpu"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert neon("check", "mine.toml")["is_ok"]
    neon("train", "mine.toml", "--out", "runs/mine_base")
    result = neon("run", "mine.toml")
    assert result["metric"] == "fd200[pixel-pca64]"
    assert not result["comparable"]
    base = checkpoint.read(tmp_path / "runs/mine_base/model.safetensors", weights="raw")
    merged = checkpoint.read(tmp_path / result["merged"], weights="any")
    shot = checkpoint.read(next((tmp_path / "runs/mine/finetune").glob("snapshot-*.safetensors")), weights="any")
    for name in base.tensors:  # the file is the paper's line
        b, s = base.tensors[name], shot.tensors[name]
        torch.testing.assert_close(merged.tensors[name], b - result["w"] * (s - b), atol=1e-6, rtol=0)


TILES = """
import torch
from fid.features import Extractor, Features

class Tiles(Extractor):
    name, dim, sha256, comparable = "tiles_of_mine:open_tiles", 49, "0" * 64, "tile means"
    def extract(self, images):
        return Features(torch.nn.functional.avg_pool2d(images.float(), 4).flatten(1) / 255, None)

def open_tiles(*, path, device, allow_unknown_weights):
    return Tiles(device)
"""


def test_an_extractor_of_ones_own_lies_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiles_of_mine.py").write_text(TILES)
    arguments = ["--extractor", "tiles_of_mine:open_tiles", "--data", ROOT / "demo/fashion_base.npz", "--device", "cpu"]
    done = invoke(main, "fid", "ref", *arguments, "--out", "ref.npz")
    assert done.exit_code == 0, done.output
    assert last_object(done.stdout)["extractor"] == "tiles_of_mine:open_tiles"


MINE = (ROOT / "neon/example/mine.py").read_text()
CONFIG = """
family = "{module}:Mine"
[model]
width = 8
[base]
checkpoint = "base.pth"
weights = "raw"
[sampling]
num_steps = 2
uint8 = "round"
[synth]
num_images = 8
[finetune]
images = 16
batch = 8
lr = 1e-4
"""


@pytest.fixture
def mine(tmp_path, monkeypatch, request):
    """Writes the example under a module name that no other test has, changed in places; returns the config."""
    monkeypatch.chdir(tmp_path)
    module = re.sub(r"\W", "_", request.node.name)[-80:]

    def written(*changes: tuple[str, str], config: tuple[tuple[str, str], ...] = ()) -> Path:
        code, table = MINE, CONFIG.format(module=module)
        for old, new in changes:
            assert old in code
            code = code.replace(old, new)
        for old, new in config:
            assert old in table
            table = table.replace(old, new)
        (tmp_path / f"{module}.py").write_text(code)
        (tmp_path / "mine.toml").write_text(table)
        return tmp_path / "mine.toml"

    yield written
    sys.modules.pop(module, None)


WRONG_CLASSES = {
    "a method that is absent": (
        ("def draw(", "def drew("),
        r":Mine lacks draw\(self, rng, codes, labels, how\): Every random number of one training step.*docs/own_model",
    ),
    "a syntax error": (("def sample(self", "def sample(self self"), r"SyntaxError: invalid syntax \(.*\.py:24\)"),
    "a module that is not there": (
        ("import torch\n", "import torch\nimport blobnett\n"),
        r"ModuleNotFoundError: No module named 'blobnett' \(.*\.py:3\)",
    ),
    "an error in the body": (('name = "mine"', "name = nameless"), r"NameError: name 'nameless'.* \(.*\.py:20\)"),
    "options that are no dataclass": (
        ("@dataclass(frozen=True, kw_only=True)\n", ""),
        r"Mine\.sampling must be a dataclass: put @dataclass\(frozen=True, kw_only=True\) above Sampling",
    ),
    "options that are not named": (
        ("    sampling = Sampling\n", ""),
        r"\[sampling\] has no key 'num_steps'.*the class Mine has no `sampling = Sampling`",
    ),
    "an argument too few": (
        ("rng, labels, how):            # noise", "rng, how):  # noise"),
        r"expected Mine\.sample\(self, model, rng, labels, how\), it is Mine\.sample\(self, model, rng, how\)",
    ),
    "no name": (('    name = "mine"\n', ""), r':Mine lacks its name: put name = "mine" into the class'),
    "arguments to make it": (
        ("    sampling = Sampling\n", "    sampling = Sampling\n    def __init__(self, size):\n        pass\n"),
        r":Mine cannot be made without arguments.*'size'",
    ),
}


@pytest.mark.parametrize(("change", "said"), WRONG_CLASSES.values(), ids=WRONG_CLASSES.keys())
def test_a_class_that_is_no_whole_family_is_one_sentence(mine, change, said):
    done = invoke(main, "check", mine(change))
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), "one line, no traceback"
    assert re.search(said, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("{}:Main", r"has no Main; did you mean \w+:Mine\?"),
        ("{}:Net", r"expected a subclass of neon\.family\.Family; did you mean \w+:Mine\?"),
        ("{}.py:Mine", r"a module is named without \.py: family = '\w+:Mine'"),
        ("Mine", r"no family 'Mine': Use one of the shipped names"),
    ],
)
def test_a_family_that_is_named_wrongly_is_named_rightly(mine, named, said):
    path = mine()
    text = path.read_text()
    module = re.search(r'"(\w+):Mine"', text)[1]
    path.write_text(text.replace(f'"{module}:Mine"', f'"{named.format(module)}"'))
    done = invoke(main, "check", path)
    assert done.exit_code == 1
    assert re.search(said, done.stderr), done.stderr


def test_an_edit_of_any_module_beside_the_family_is_an_edit_of_its_source(tmp_path, monkeypatch):
    """Also of one that is imported late, and of what that one imports; not of what is not imported."""
    monkeypatch.syspath_prepend(tmp_path)
    files = {
        "hashed_family.py": "from hashed_net import WIDTH\nclass Kind:\n    def f(self):\n        import hashed.late\n",
        "hashed_net.py": "import os, torch\nWIDTH = 8\n",
        "hashed/__init__.py": "",
        "hashed/late.py": "from . import deep\nfrom ... import beyond\n",
        "hashed/deep.py": "DEEP = 1\n",
        "stranger.py": "",
    }
    (tmp_path / "hashed").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    kind = importlib.import_module("hashed_family").Kind
    seen = {source_sha256(kind)}
    for name in files:
        (tmp_path / name).write_text(files[name] + "# edited\n")
        changed = source_sha256(kind)
        assert (changed in seen) == (name == "stranger.py"), name
        seen.add(changed)


def test_the_source_of_a_family_in_one_file_is_that_file(tmp_path, monkeypatch):
    """As it was before modules beside it counted: runs that have been begun go on."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "alone_family.py").write_text("import torch\nclass Kind: ...\n")
    kind = importlib.import_module("alone_family").Kind
    assert source_sha256(kind) == hashlib.sha256((tmp_path / "alone_family.py").read_bytes()).hexdigest()


def plain_weights(width: int) -> Path:
    """A state dict of the example's network, as torch.save writes it; in the working folder."""
    sizes = ((width, 785), (width,), (width, width), (width,), (784, width), (784,))
    names = (f"layers.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias"))
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.1 * torch.randn(size, generator=generator) for name, size in zip(names, sizes, strict=True)}
    torch.save(weights, "base.pth")
    return Path("base.pth")


TELLS = ("    def sample(", "    def arch_of(self, found):\n        return {'width': 8}\n    def sample(")


def test_plain_weights_are_built_as_model_says(mine):
    config = mine()
    plain_weights(8)
    done = invoke(main, "synth", config, "--out", "run", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    assert json.loads(Path("run/synth/manifest.json").read_text())["model"] == {"width": 8}


def test_what_model_said_is_part_of_what_a_run_depends_on(mine):
    """The same weights in a network of other options give other images."""
    config = mine(
        ("def __init__(self, width):", "def __init__(self, width, gain=1.0):"),
        ("super().__init__()\n        layers", "super().__init__()\n        self.gain = gain\n        layers"),
        ("return self.layers(torch", "return self.gain * self.layers(torch"),
    )
    plain_weights(8)
    options = ["synth", config, "--out", "run", "--device", "cpu"]
    assert invoke(main, *options).exit_code == 0
    done = invoke(main, *options, "--set", "model.gain=2.0")
    assert done.exit_code == 1
    assert "begun with another setting: model" in done.stderr


@pytest.mark.parametrize("width", ['"8"', "9"])
def test_a_model_that_contradicts_the_checkpoint_is_refused(mine, width):
    config = mine(TELLS, config=(("width = 8", f"width = {width}"),))
    plain_weights(8)
    value = width.replace('"', "'")
    said = f"[model] width = {value}, but Mine.arch_of(base.pth) says width = 8"
    for command in (["check", config], ["synth", config, "--out", "run"]):
        done = invoke(main, *command, "--device", "cpu")
        assert done.exit_code == 1
        assert said in done.stderr


def test_a_file_that_says_how_it_is_built_is_held_against_model(mine):
    config = mine(config=(("base.pth", "base.safetensors"), ("width = 8", "width = 9")))
    weights = torch.load(plain_weights(8), weights_only=True)
    checkpoint.write("base.safetensors", weights, metadata={"arch": {"width": 8}, "weights": "raw"})
    done = invoke(main, "check", config, "--device", "cpu")
    assert "[model] width = 9, but base.safetensors says width = 8" in done.stderr
    done = invoke(main, "check", config, "--device", "cpu", "--set", "model.width=8", "--set", "model.depth=3")
    assert "[model] depth = 3, but base.safetensors has no 'depth'" in done.stderr
    done = invoke(
        main, "check", config, "--device", "cpu", "--set", "train={images=8, batch=8, lr=1.0, arch={width=8}}"
    )
    assert "ok    network" in done.stderr, "[train.arch] is what the base was trained with"


def test_arguments_that_are_no_dict_are_refused(mine):
    config = mine((TELLS[0], TELLS[1].replace("{'width': 8}", "None")))
    plain_weights(8)
    done = invoke(main, "check", config, "--device", "cpu")
    assert "Mine.arch_of(base.pth) must be a dict of constructor arguments, it is None" in done.stderr


def test_where_nothing_says_how_it_is_built_the_line_is_shown(mine):
    config = mine(config=(("[model]\nwidth = 8\n", ""),))
    plain_weights(8)
    done = invoke(main, "check", config, "--device", "cpu")
    assert done.exit_code == 1
    assert "base.pth does not say how its network is built" in done.stderr
    assert "\n  [model]\n  width = 16\n" in done.stderr


WRONG_METHODS = {
    "images without channels": (
        ("return x.clamp(-1, 1), None", "return x[:, 0], None"),
        r"FAIL  images: Mine\.sample must return float images .* is missing: return x\[:, None\]",
    ),
    "images in [0, 1]": (
        ("return x.clamp(-1, 1), None", "return x.sigmoid(), None"),
        r"Mine\.sample must return \[-1, 1\]",
    ),
    "the batch in the shape of noise": (
        ("x = rng.normal((1, 28, 28))", "x = rng.normal((4, 1, 28, 28))"),
        r"FAIL  images: Mine\.sample: R.*13\); with x \(4, 4, 1, 28, 28\); rng\.normal .* shape of one image",
    ),
    "draws of another shape": (
        ("rng.uniform((1, 1, 1))", "rng.uniform(())"),
        r'FAIL  loss per image: Mine\.loss: R.*33\); with draws\["t"\] \(4,\), draws\["noise"\] \(4, 1, 28, 28\)',
    ),
    "labels that are none": (
        ("x = rng.normal((1, 28, 28))", "x = rng.normal((1, 28, 28)) + labels % 10"),
        r"FAIL  images: Mine\.sample: TypeError: .*labels is None: define num_classes\(model\) to get labels",
    ),
    "codes that are bytes": (
        ("codes / 127.5 - 1", "codes"),
        r"warn  loss per image: [\d.e+ ]+; from a black to a white image the network's input moves by \d+ instead of 2",
    ),
}


@pytest.mark.parametrize(("change", "said"), WRONG_METHODS.values(), ids=WRONG_METHODS.keys())
def test_a_mistake_in_a_method_is_told_with_what_was_written(mine, change, said):
    config = mine(change)
    (config.parent / "base.pth").unlink(missing_ok=True)
    done = invoke(main, "check", config, "--device", "cpu")
    assert re.search(said, done.stderr), done.stderr


@pytest.mark.parametrize("command", [["check"], ["synth", "--out", "run"], ["sample", "--out", "images"]])
@pytest.mark.parametrize(("wrote", "reads"), [("theirs:Theirs", "edm"), ("edm", "MODULE:Mine")])
def test_a_family_that_fails_on_the_file_of_another_names_both(mine, command, wrote, reads):
    config = mine()
    reads = reads.replace("MODULE", re.search(r'"(\w+):', config.read_text())[1])
    written = {"family": wrote, "arch": {"model_channels": 8}, "weights": "raw"}
    checkpoint.write(Path("base.safetensors"), {"layers.weight": torch.zeros(8, 8)}, metadata=written)
    config.write_text(config.read_text().replace("[model]\nwidth = 8\n", ""))
    about, chosen = config, ["--set", f"family={reads}", "--set", "base.checkpoint=base.safetensors"]
    if command[0] == "sample":
        about, chosen = "base.safetensors", ["--family", reads]
    done = invoke(main, command[0], about, *command[1:], *chosen, "--device", "cpu")
    assert done.exit_code == 1
    assert f"base.safetensors was written by the family {wrote!r} and cannot be read by {reads!r}" in done.stderr
    assert f"name {wrote!r} (family in a config, --family of a command)" in done.stderr
    assert "model_channels" in done.stderr if wrote == "edm" else "arch.class_name" in done.stderr, "and why"


def test_the_example_refuses_steps_that_would_leave_noise(mine):
    config = mine()
    done = invoke(main, "check", config, "--set", "sampling.num_steps=-4", "--device", "cpu")
    assert done.exit_code == 1
    assert "sampling.num_steps must be >= 1, got -4" in done.stderr


class Halved(Line):
    """It trains on what it makes of the images once."""

    def encode(self, images):
        return images // 2


def test_an_encoding_by_another_version_of_the_family_is_not_gone_on_with(tmp_path, monkeypatch):
    """Killed before the first update, edited, started again: half of the codes would be of the old `encode`."""
    np.savez(tmp_path / "data.npz", images=np.full((6, 4, 4), 9, np.uint8), labels=np.arange(6) % 3)
    train = "images = 4\nbatch = 2\nlr = 1e-3"
    text = (
        f'family = "tests.core.test_own_model:Halved"\n[model]\n[data]\npath = "{tmp_path}/data.npz"\n[train]\n{train}'
    )
    (tmp_path / "line.toml").write_text(text)

    def killed(*arguments):
        raise InterruptedError

    for source, outcome, said in (("one", InterruptedError, None), ("another", ValueError, "family_source is 'one'")):
        monkeypatch.setattr(train_base, "source_sha256", lambda kind, source=source: source)
        monkeypatch.setattr(train_base, "train", killed)
        with pytest.raises(outcome, match=said):
            train_base.train_base(load(tmp_path / "line.toml"), tmp_path / "run", World())


class Anchored(Line):
    """A part of its network is fixed, as the position tables of many transformers are."""

    def build(self, arch):
        model = super().build(arch)
        model.anchor = torch.nn.Parameter(torch.full((1, 4, 4), 0.1), requires_grad=False)
        return model

    def loss(self, model, codes, labels, draws, how):
        return super().loss(model, codes, labels, draws, how) + (model.mean[labels] - model.anchor).square().sum(
            (1, 2, 3)
        )


def test_parameters_that_the_network_holds_fast_are_not_trained(line_config, tmp_path):
    path = tmp_path / "base.safetensors"
    checkpoint.write(path, Anchored().build({}).state_dict(), metadata={"arch": {}, "weights": "ema"})
    config = load(line_config, ["family=tests.core.test_own_model:Anchored"])
    Run(config, tmp_path / "run", World()).all()
    base, merged = (checkpoint.read(file, weights="any").tensors for file in (path, tmp_path / "run/neon.safetensors"))
    shot = checkpoint.read(tmp_path / "run/finetune/snapshot-000000000096.safetensors", weights="any").tensors
    assert not torch.equal(shot["mean"], base["mean"])
    assert torch.equal(shot["anchor"], base["anchor"])
    assert torch.equal(merged["anchor"], base["anchor"])
