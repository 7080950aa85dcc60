"""The published command: from a pickle of the original layout to one JSON object, alone and under torchrun."""

import pytest
import torch
from click.testing import CliRunner

from edm.calculate_fid import main
from edm.family import EDM
from edm.guidance import NegativeGuidance
from edm.options import Sampling
from edm.presets import MODELS
from fid.frechet import frechet_distance
from fid.moments import Moments
from fid.reference import read_reference, write_reference
from neon.checkpoints import checkpoint
from neon.quantize import to_uint8
from neon.seeds import ImageRng
from tests.commands import FidCommand
from tests.edm import published
from tests.quarters_extractor import Quarters, write_statistics

COMMAND = FidCommand("edm", main, {"--network_pkl": "model.pkl", "--ref": "stats.npz"})


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, patch):
    """A folder with a small conditional network, a second one of the same kind, and statistics."""
    folder = tmp_path_factory.mktemp("published")
    net = published.write_checkpoint(patch, folder / "model.pkl", published.TINY)
    other = {name: value * 0.9 for name, value in net.state_dict().items()}
    checkpoint.write(
        folder / "other.safetensors", other, metadata={"family": "edm", "arch": published.TINY, "weights": "ema"}
    )
    write_statistics(folder / "stats.npz", 8)
    return folder


def by_hand(folder, model, seeds, how):
    codes, _ = EDM().sample(model.eval(), ImageRng(seeds), None, how)
    moments = Moments(Quarters.dim)
    moments.update(Quarters()(to_uint8(codes, "edm")).pool)
    return frechet_distance(generated=moments.gaussian(), reference=read_reference(folder / "stats.npz"))


def test_the_number_is_the_one_of_the_parts(tiny):
    """Sampled, quantised and measured here by hand: the same Frechet distance."""
    found = COMMAND.here(tiny, "--seeds", "5-27", "--max_batch_size", 7, "--num_steps", 3)
    model = EDM().load(checkpoint.read(tiny / "model.pkl"))
    assert found["value"] == pytest.approx(by_hand(tiny, model, range(5, 28), Sampling(num_steps=3)), rel=1e-3)
    assert found["metric"] == "fd23[quarters]"
    assert (found["num_images"], found["first_seed"], found["labels"]) == (23, 5, "drawn")
    assert found["sampling"]["uint8"] == "edm"
    assert found["comparable"] is False


def test_guidance_by_a_second_model(tiny):
    how = Sampling(num_steps=3)
    found = COMMAND.here(
        tiny, "--seeds", "0-19", "--num_steps", 3, "--guide", tiny / "other.safetensors", "--guidance", 0.5
    )
    net, other = (EDM().load(checkpoint.read(tiny / name)).eval() for name in ("model.pkl", "other.safetensors"))
    assert found["value"] == pytest.approx(by_hand(tiny, NegativeGuidance(net, other, 0.5), range(20), how), rel=1e-3)
    assert found["value"] != pytest.approx(by_hand(tiny, net, range(20), how), rel=1e-2)


def test_options_reach_the_sampler(tiny):
    plain = COMMAND.here(tiny, "--seeds", "0-9", "--num_steps", 4)["value"]
    for option in (
        ("--num_steps", 3),
        ("--S_churn", 3),
        ("--rho", 3),
        ("--sigma_max", 20),
        ("--sigma_min", 0.5),
        ("--uint8", "truncate"),
    ):
        assert COMMAND.here(tiny, "--seeds", "0-9", "--num_steps", 4, *option)["value"] != plain, option


def test_ranks_and_batches_do_not_change_the_number(tiny):
    options = ("--seeds", "3-13", "--num_steps", 2)
    one, two = (COMMAND.outside(tiny, *options, "--max_batch_size", 4, ranks=ranks) for ranks in (1, 2))
    assert two["ranks"] == 2
    assert two["value"] == pytest.approx(one["value"], rel=1e-4)
    assert two["value"] == pytest.approx(COMMAND.here(tiny, *options, "--max_batch_size", 11)["value"], rel=1e-4)


@pytest.mark.parametrize("seeds", ["7", "9-3", "5-5", "0-3,8-11", "a-b"])
def test_seeds_must_be_one_block(tiny, seeds):
    done = COMMAND.invoke(tiny, "--seeds", seeds)
    assert done.exit_code == 2
    assert "FIRST-LAST" in done.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rho", "0"], "Error: --rho must be > 0, got 0.0\n"),
        (["--sigma_min", "90"], "Error: --sigma_min must be below --sigma_max, got 90.0 and 80.0\n"),
        (["--S_churn", "nan"], "Error: --S_churn: expected a finite number, found nan\n"),
    ],
)
def test_a_wrong_flag_is_named_as_it_is_spelled(tiny, flags, message):
    paths = ["--network_pkl", str(tiny / "model.pkl"), "--ref", str(tiny / "stats.npz")]
    assert CliRunner().invoke(main, [*paths, *flags]).output == message


def test_a_missing_file_is_one_line(tiny):
    done = CliRunner().invoke(main, ["--network_pkl", str(tiny / "model.pkl"), "--ref", str(tiny / "none.npz")])
    assert done.exit_code == 1
    assert "none.npz" in done.output
    assert "Traceback" not in done.output


def test_a_reference_of_another_extractor_is_refused_before_anything_is_sampled(tiny, monkeypatch):
    monkeypatch.setattr(EDM, "sample", lambda *_: pytest.fail("images were sampled"))
    moments = Moments(Quarters.dim)
    moments.update(torch.eye(Quarters.dim))
    for provenance in ({"extractor": "others"}, {"extractor": "quarters", "extractor_sha256": "1" * 64}):
        write_reference(tiny / "foreign.npz", moments, provenance)
        done = COMMAND.invoke(tiny, "--seeds", "0-9", "--ref", tiny / "foreign.npz")
        assert done.exit_code == 1
        assert "foreign.npz" in done.output
        assert "their distance means nothing" in done.output


def test_cautions_stand_in_the_result(tiny):
    """Ten images for twelve features: the covariance is singular."""
    found = COMMAND.here(tiny, "--seeds", "0-9", "--num_steps", 2)
    assert "10 images for 12 features" in found["cautions"][0]
    assert COMMAND.here(tiny, "--seeds", "0-19", "--num_steps", 2)["cautions"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_steps"),
    [("edm-cifar10-32x32-cond-vp", 18), ("edm-cifar10-32x32-uncond-vp", 18), ("edm-ffhq-64x64-uncond-vp", 40)],
)
def test_published_command_at_real_size(tmp_path, patch, name, num_steps):
    """Real sizes, true pickle layout, the FID Inception's architecture; the weights of both are seeded by name."""
    published.write_checkpoint(patch, tmp_path / "model.pkl", dict(MODELS[name]))
    extractor = published.open_seeded_inception(path=None, device="cpu", allow_unknown_weights=False)
    size = int(MODELS[name]["img_resolution"])
    moments = Moments(extractor.dim)
    moments.update(
        extractor(
            torch.randint(256, (4, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        ).pool
    )
    write_reference(tmp_path / "stats.npz", moments, {"extractor": extractor.name})
    options = ("--seeds", "0-1", "--max_batch_size", 256, "--num_steps", num_steps)
    found = COMMAND.outside(tmp_path, *options, "--extractor", "tests.edm.published:open_seeded_inception")
    assert found["value"] > 0
    assert found["num_images"] == 2
    assert found["sampling"]["options"]["num_steps"] == num_steps
