"""`neon sample`: a checkpoint of any family becomes PNG files, the ones that its family samples."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from neon.checkpoints import checkpoint
from neon.cli.main import main
from neon.config_table import to_plain
from neon.family import resolve
from neon.images.formats import open_images
from neon.own_code import shipped
from neon.pipeline.experiment import load
from neon.pipeline.run import Run
from neon.pipeline.sample import _options, _own_options
from neon.quantize import to_uint8
from neon.runtime.distributed import World
from neon.seeds import ImageRng
from tests.commands import ROOT, invoke, last_object

OPTIONS = {
    "flow": ["num_steps=2", "solver=euler"],
    "imm": ["num_steps=2", "cfg_scale=1.5"],
    "var": ["cfg_scale=1.5"],
    "xar": ["num_steps=2", "cfg_scale=1.5"],
}
AUTOENCODERS = {"var": "var_fashion_tokeniser", "xar": "xar_fashion_vae"}


def words(options: list[str]) -> list[str]:
    return [word for option in options for word in ("--set", option)]


def write_fresh(name: str, folder) -> list[str]:
    """A fresh network of configs/tiny_NAME.toml (and of its autoencoder's config) as files; the options that name
    them."""
    torch.manual_seed(0)
    config = load(ROOT / f"configs/tiny_{name}.toml")
    model = config.family().build(config.model)
    meta = {"family": name, "arch": dict(config.model), "weights": "raw"}
    checkpoint.write(folder / "model.safetensors", model.state_dict(), metadata=meta)
    if name not in AUTOENCODERS:
        return []
    other = load(ROOT / f"configs/{AUTOENCODERS[name]}.toml")
    autoencoder = other.family().trainable_autoencoder.build(other.autoencoder.arch)
    meta = {"family": name, "arch": dict(other.autoencoder.arch), "weights": "raw"}
    checkpoint.write(folder / "autoencoder.safetensors", autoencoder.state_dict(), metadata=meta)
    return ["--autoencoder", str(folder / "autoencoder.safetensors")]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_family_writes_its_images(name, tmp_path):
    """The zip holds the pixels that the folder holds, with class i mod 10 for image i; other seeds, other images."""
    arguments = [tmp_path / "model.safetensors", "--num-images", 3, "--batch", 2, "--device", "cpu"]
    arguments += write_fresh(name, tmp_path) + words(OPTIONS[name])
    for out in ("folder", "set.zip"):
        done = invoke(main, "sample", *arguments, "--out", tmp_path / out)
        assert done.exit_code == 0, done.output
        assert last_object(done.stdout)["num_images"] == 3
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [f"{i:08d}.png" for i in range(3)]
    pixels = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "folder").iterdir())]
    stored = open_images(tmp_path / "set.zip")
    assert (stored.read(range(3))[:, 0].numpy() == np.stack(pixels)).all()
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        labels = json.loads(archive.read("dataset.json"))["labels"]
    assert [label for _, label in labels] == [0, 1, 2]
    done = invoke(main, "sample", *arguments, "--first-seed", 7, "--out", tmp_path / "other.zip")
    assert done.exit_code == 0, done.output
    assert (open_images(tmp_path / "other.zip").read(range(3)) != stored.read(range(3))).any()


def test_the_pixels_are_those_that_the_family_samples(tmp_path):
    """The demo's EDM, by hand: same seeds, same classes, rounding by the rule that is named."""
    base = ROOT / "demo/base.safetensors"
    options = ["--num-images", 4, "--first-seed", 3, "--uint8", "edm", "--set", "num_steps=3", "--device", "cpu"]
    done = invoke(main, "sample", base, *options, "--out", tmp_path / "set.zip")
    assert done.exit_code == 0, done.output
    found = checkpoint.read(base)
    config = load(ROOT / "configs/demo.toml")
    family = config.family()
    model = family.load(found).eval()
    classes = family.num_classes(model)
    labels = torch.arange(4) % classes if classes else None
    with torch.no_grad():
        codes, _ = family.sample(model, ImageRng(range(3, 7)), labels, family.sampling(num_steps=3))
    assert (open_images(tmp_path / "set.zip").read(range(4)) == to_uint8(family.decode(codes), "edm")).all()


def test_a_merged_file_is_sampled_as_its_w_was_chosen(line_config, tmp_path):
    """The images of `neon sample` are those of the report's row, unless another option is named."""
    result = Run(load(line_config, ["sampling.uint8=edm"]), tmp_path / "run", World()).all()
    merged, family = tmp_path / "run/neon.safetensors", "tests.core.line_family:Line"
    said = checkpoint.read(merged).meta["sampling"]
    assert said["cfg_scale"] == result["cfg_scale"]
    arguments = ["--family", family, "--num-images", 3, "--device", "cpu"]
    done = {
        name: invoke(main, "sample", merged, *arguments, *options, "--out", tmp_path / f"{name}.zip")
        for name, options in (
            ("own", []),
            ("named", words([f"{k}={v}" for k, v in said.items()])),
            ("other", words(["cfg_scale=9"])),
        )
    }
    assert all(d.exit_code == 0 for d in done.values()), [d.output for d in done.values()]
    assert last_object(done["own"].stdout)["sampling"] == said
    assert last_object(done["own"].stdout)["from_file"] == sorted(said)
    assert "cfg_scale" not in last_object(done["other"].stdout)["from_file"]
    own, named, other = ((tmp_path / f"{name}.zip").read_bytes() for name in done)
    assert own == named != other


@pytest.mark.parametrize("name", shipped())
def test_the_sampling_options_of_a_merged_file_are_read_back(name, tmp_path):
    """EDM's S_max is infinite, which JSON is not: every merged file of an EDM was refused."""
    family = resolve(name)
    plain = family.sampling(**({"num_steps": 3} if name == "xar" else {}))
    options = family.with_guidance(plain, 1.5) if family.is_guided else plain
    path = tmp_path / "merged.safetensors"
    checkpoint.write(path, {"x": torch.zeros(1)}, metadata={"weights": "raw", "sampling": to_plain(options)})
    assert _options(family, _own_options(checkpoint.read(path, weights="any"), family)) == options


def refused(*arguments: object) -> str:
    done = invoke(main, "sample", *arguments)
    assert done.exit_code == 1, done.output
    return done.stderr


def test_what_is_wrong_is_said(tmp_path):
    base, out = ROOT / "demo/base.safetensors", tmp_path / "out"
    assert "--set: [sampling] has no key 'steps'" in refused(base, "--set", "steps=3", "--out", out)
    assert "options of edm: num_steps" in refused(base, "--set", "steps=3", "--out", out)
    write_fresh("imm", tmp_path)
    said = refused(tmp_path / "model.safetensors", "--out", out)
    assert "the family imm is guided, name the scale: --set cfg_scale=" in said
    checkpoint.write(tmp_path / "own.safetensors", {"a": torch.ones(1)}, metadata={"family": "os:Own", "arch": {}})
    said = refused(tmp_path / "own.safetensors", "--out", out)
    assert "is of the family 'os:Own': name it with --family" in said
    checkpoint.write(tmp_path / "unet.safetensors", {"a": torch.ones(1)}, metadata={"family": "diffusers", "arch": {}})
    for options in ((), ("--family", "diffusers")):
        said = refused(tmp_path / "unet.safetensors", *options, "--out", out)
        assert f"DiffusionPipeline.from_pretrained('{tmp_path / 'pipeline'}')" in said
    assert not out.exists()
    out.mkdir()
    assert f"{out} is there already" in refused(base, "--out", out)
