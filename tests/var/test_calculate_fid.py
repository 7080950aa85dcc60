"""The published command: from files of the published layout to one JSON object, alone and under torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch._subclasses.fake_tensor import FakeTensorMode

from fid.frechet import frechet_distance
from fid.moments import Moments
from fid.reference import read_reference
from neon.checkpoints import checkpoint
from neon.quantize import to_uint8
from neon.seeds import image_rng
from tests.commands import FidCommand
from tests.quarters_extractor import Quarters
from tests.var import published
from var import calculate_fid, presets
from var.family import VAR
from var.options import Sampling
from var.transformer import Transformer

COMMAND = FidCommand(
    "var", calculate_fid.main, {"--var_ckpt": "var.pth", "--vae_ckpt": "vae.pth", "--fid_stats": "stats.npz"}
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    published.write_tiny(folder)
    return folder


def test_the_number_is_the_one_of_the_parts(tiny):
    """Sampled, decoded, quantised and measured here by hand: the same Frechet distance, with the defaults of the Neon
    row."""
    found = COMMAND.here(
        tiny, "--N", 13, "--batch_size", 7, "--img_size", 32, "--model_depth", 2, "--seed", 5, "--top_k", 9
    )
    assert found["sampling"]["options"] == {"cfg_scale": 2.8, "top_k": 9, "top_p": 0.95, "more_smooth": False}
    assert found["sampling"]["uint8"] == "truncate"
    family = VAR()
    model = family.load(checkpoint.read(tiny / "var.pth")).eval()
    family.open(tiny / "vae.pth", torch.device("cpu"))
    with torch.inference_mode():
        codes, _ = family.sample(
            model, image_rng(5, range(13), "cpu"), torch.arange(13) % 10, Sampling(cfg_scale=2.8, top_k=9)
        )
        images = to_uint8(family.decode(codes), "truncate")
    moments = Moments(Quarters.dim)
    moments.update(Quarters()(images).pool)
    expected = frechet_distance(generated=moments.gaussian(), reference=read_reference(tiny / "stats.npz"))
    assert found["value"] == pytest.approx(expected, rel=1e-3)
    assert found["metric"] == "fd13[quarters]"
    assert found["comparable"] is False


def test_ranks_and_batches_do_not_change_the_number(tiny):
    alone = COMMAND.here(tiny, "--num_images", 9, "--batch_size", 64, "--protocol", "base")
    together = COMMAND.outside(tiny, "--num_images", 9, "--batch_size", 2, "--protocol", "base", ranks=2)
    assert together["ranks"] == 2
    assert alone["sampling"]["options"]["cfg_scale"] == together["sampling"]["options"]["cfg_scale"] == 1.5
    assert together["value"] == pytest.approx(alone["value"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model_depth", 16), "--model_depth 16"),
        (("--img_size", 256), "makes images of 32 x 32"),
        (("--var_ckpt", "absent.pth"), "--var_ckpt: there is no absent.pth"),
        (("--vae_ckpt", "absent.pth"), "--vae_ckpt: there is no absent.pth"),
        (("--fid_stats", "absent.npz"), "--fid_stats: there is no absent.npz"),
        (("--cfg", -1), "--cfg must be >= 0"),
    ],
)
def test_a_mistake_is_one_line(tiny, options, message):
    done = COMMAND.invoke(tiny, "--num_images", 2, *options)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_swapped_file_is_named(tiny):
    done = COMMAND.invoke(tiny, "--var_ckpt", tiny / "vae.pth")
    assert done.exit_code == 1
    assert "vae.pth: not a VAR state dict" in done.output


@pytest.mark.parametrize(
    ("name", "protocol", "scale"),
    [("d16", "neon", 2.8), ("d36", "neon", 3.2), ("d30", "base", 1.5), ("d36", "base", 2.0)],
)
def test_the_guidance_of_a_row_follows_from_the_file(name, protocol, scale):
    assert calculate_fid.default_cfg(presets.published(name), protocol) == scale


def test_no_guidance_is_guessed_for_other_scales():
    arch = published.VARArch(depth=1, embed_dim=8, heads=1, patch_nums=(1, 2))
    with pytest.raises(ValueError, match="--cfg"):
        calculate_fid.default_cfg(arch, "neon")


def test_the_help_names_the_published_flags():
    text = CliRunner().invoke(calculate_fid.main, ["--help"]).output
    flags = "var_ckpt num_images N batch_size img_size fid_stats vae_ckpt cfg top_k top_p more_smooth seed inception "
    flags += "model_depth protocol"
    for flag in flags.split():
        assert f"--{flag} " in text, flag


@pytest.mark.slow
def test_the_published_command_in_real_size(tmp_path):
    """d16 as printed but for the missing weights: few images, another feature network; plain python and torchrun.

    One image per call in both: with random weights the last bits of another batch size can turn a token, and with it
    all that follow.
    """
    published.write_real(tmp_path)
    options = ("--num_images", 2, "--batch_size", 1, "--img_size", 256)
    alone = COMMAND.outside(tmp_path, *options)
    together = COMMAND.outside(tmp_path, *options, ranks=2)
    assert (alone["ranks"], together["ranks"]) == (1, 2)
    assert alone["num_images"] == together["num_images"] == 2
    assert alone["sampling"]["options"]["cfg_scale"] == 2.8
    assert together["value"] == pytest.approx(alone["value"], rel=1e-3)


@torch.no_grad()
def test_d36_fits_together_at_512_pixels(monkeypatch):
    """Every tensor of guided sampling and of a training step in true size, on fake tensors: shapes without content."""
    monkeypatch.setattr(Transformer, "initialise", lambda model: None)  # it looks at values
    with FakeTensorMode():
        model = Transformer(presets.published("d36"))
        labels = torch.zeros(4, dtype=torch.int64)
        conditioning, memory = model.conditioning(labels), model.sampling_memory(4)
        tokens = model.first_tokens(conditioning)
        for scale, side in enumerate(presets.PATCH_NUMS[512]):
            logits = model.next_logits(tokens, conditioning.blocks, conditioning.head, memory, scale)
            assert logits.shape == (4, side * side, 4096)
            if side < 32:
                finer = presets.PATCH_NUMS[512][scale + 1]
                tokens = model.scale_tokens(torch.empty(4, finer * finer, 32), scale + 1)
        assert memory.tensor.shape[4] == 1216
        assert model(labels, torch.empty(4, 2239, 32)).shape == (4, 2240, 4096)
