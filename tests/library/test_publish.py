"""`neon publish` and hf://: a finished run as a folder for the Hub, against a stand-in of its API on the loopback
interface."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import neon
from neon.checkpoints import checkpoint
from neon.pipeline.experiment import load
from neon.pipeline.publish import publish
from neon.pipeline.run import Run
from neon.report.card import model_card
from neon.runtime.distributed import World
from neon.store import hub
from tests.commands import ROOT
from tests.core.conftest import line_config  # noqa: F401 - a fixture
from tests.library.hub_server import TOKEN, Hub


@pytest.fixture
def server():
    with Hub() as found:
        yield found


@pytest.fixture
def finished(line_config, tmp_path):  # noqa: F811
    Run(load(line_config), tmp_path / "run", World()).all()
    return tmp_path / "run"


def command(server_url, home, *arguments, **environment):
    """`neon ARGUMENTS` with its own Hub cache, in a process of its own (the address is read when it starts)."""
    settings = {"HF_ENDPOINT": server_url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return subprocess.run(
        [sys.executable, "-m", "neon", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **settings, **environment},
        capture_output=True,
        text=True,
    )


def parsed(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_published_folder_holds_weights_card_numbers_and_pictures(finished):
    written = publish(finished, finished / "published")
    folder = finished / "published"
    result = json.loads((finished / "result.json").read_text())
    expected = ["README.md", "config.json", "model.safetensors", "neon.json", "report.html", "report.png"]
    assert written["files"] == expected
    assert (folder / "model.safetensors").read_bytes() == (finished / "neon.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert (config["family"], config["w"]) == ("tests.core.line_family:Line", result["w"])
    card = (folder / "README.md").read_text()
    for name, row in result["rows"].items():
        assert f"{row['metrics'][result['metric']]:.4g}" in card, name
    for text in (
        "a random direction",
        "self-trained (w = -1)",
        "Not comparable with published FIDs",
        "arXiv:2510.03597",
    ):
        assert text in card
    for setting in ("num_images `50`", "first_seed `1000`", "lr `0.01`", "uint8 `round`"):
        assert setting in card
    assert str(finished) not in card + json.dumps({k: v for k, v in written.items() if k != "out"})
    assert "merged" not in json.loads((folder / "neon.json").read_text())
    assert publish(finished, folder)["files"] == expected  # again, in its place


def test_the_card_names_the_guidance_that_its_numbers_were_measured_at(finished):
    """It said the family's default and `selected`, and `neon eval` as the card gave it was an error."""
    result = json.loads((finished / "result.json").read_text())
    scales = dict(zip(result["rows"], (1.0, 1.25, 1.25, 1.25), strict=True))
    rows = {name: row | {"cfg_scale": scales[name]} for name, row in result["rows"].items()}
    card = model_card(result | {"cfg_scale": 1.25, "rows": rows}, is_pipeline=False)
    assert "to be sampled with **cfg_scale = 1.25**" in card
    assert "--weights any --set report.cfg_scale=1.25\n" in card
    assert "| weights | w | cfg_scale | " in card
    assert f"| base model (w = 0) | 0 | 1 | {rows['base']['metrics'][result['metric']]:.4g}" in card
    without = {name: row | {"cfg_scale": None} for name, row in rows.items()}
    card = model_card(result | {"cfg_scale": None, "rows": without}, is_pipeline=False)
    assert "sampled with" not in card
    assert "report.cfg_scale" not in card
    assert f"| base model (w = 0) | 0 | {rows['base']['metrics'][result['metric']]:.4g}" in card


def test_the_card_of_a_pipeline_names_its_base_and_how_to_load_it(finished):
    result = json.loads((finished / "result.json").read_text())
    result["config"]["base"] |= {"checkpoint": "hf://owner/base", "prompts": "prompts.txt"}
    card = model_card(result, is_pipeline=True)
    front = card.split("---")[1].splitlines()
    assert {"library_name: diffusers", "base_model: owner/base", "pipeline_tag: text-to-image"} <= set(front)
    assert "DiffusionPipeline.from_pretrained" in card
    assert "load_lora_weights" not in card
    card = model_card(result, is_pipeline=True, has_adapter=True)
    assert 'pipeline = DiffusionPipeline.from_pretrained("owner/base")\npipeline.load_lora_weights("OWNER/NAME"' in card


def test_runs_that_cannot_be_published_are_refused(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no result\.json, so the run is not finished"):
        publish(tmp_path, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not made by `neon publish`"):
        publish(finished, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "mine"
    base = checkpoint.read(tmp_path / "base.safetensors")
    checkpoint.write(finished / "neon.safetensors", base.tensors, metadata={})
    with pytest.raises(ValueError, match=r"neon\.safetensors is not the file that result\.json measured"):
        publish(finished, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_push_and_use_from_the_hub(finished, server, line_config, tmp_path):  # noqa: F811
    pushed = parsed(command(server.url, tmp_path / "home", "publish", finished, "--push", "me/line", "--private"))
    assert pushed["pushed"] == f"{server.url}/me/line"
    assert server.private == {"me/line"}
    assert server.repos["me/line"]["model.safetensors"] == (finished / "neon.safetensors").read_bytes()
    assert set(server.repos["me/line"]) == set(pushed["files"])

    name = "hf://me/line/model.safetensors"
    about = parsed(command(server.url, tmp_path / "home", "info", name))
    assert about["sha256"] == json.loads((finished / "result.json").read_text())["hashes"]["neon_sha256"]
    settings = ("--set", f"base.checkpoint={name}", "--set", "report.cfg_scale=1.0", "--device", "cpu")
    there = parsed(command(server.url, tmp_path / "home", "eval", line_config, *settings, "--out", tmp_path / "a"))
    local = ("--set", f"base.checkpoint={finished / 'neon.safetensors'}", *settings[2:])
    here = parsed(command(server.url, tmp_path / "home", "eval", line_config, *local, "--out", tmp_path / "b"))
    assert there["value"] == here["value"]

    before = len(server.requests)
    offline = command(server.url, tmp_path / "home", "info", name, HF_HUB_OFFLINE="1")
    assert parsed(offline)["sha256"] == about["sha256"]
    absent = command(server.url, tmp_path / "home2", "info", name, HF_HUB_OFFLINE="1")
    assert absent.returncode == 1
    assert "is not in the cache" in absent.stderr
    assert "HF_HUB_OFFLINE is set" in absent.stderr
    assert len(server.requests) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://me/line/none.pth", "the repository has no such file"),
        ("hf://me/nothing/x.pth", "the Hub has no such repository, or it is private"),
        ("hf://me/line@v9/x.pth", "the repository has no revision 'v9'"),
        ("hf://me", "expected hf://OWNER/NAME/FILE"),
        ("hf://me/li?ne/x", "expected hf://OWNER/NAME/FILE"),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_one_line(server, tmp_path, name, message):
    server.repos["me/line"] = {}
    done = command(server.url, tmp_path / "home", "info", name)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_cannot_be_reached_or_refuses(finished, server, tmp_path):
    gone = command("http://127.0.0.1:9", tmp_path / "home", "info", "hf://me/line/x.pth")
    assert gone.returncode == 1
    assert "the Hub cannot be reached" in gone.stderr
    push = ("publish", finished, "--push")
    for environment, url, arguments, message in (
        ({"HF_TOKEN": "wrong"}, server.url, ("me/line",), "the Hub refuses (401). Log in with `hf auth login`"),
        ({}, "http://127.0.0.1:9", ("me/line",), "me/line: the Hub cannot be reached"),
        ({}, server.url, ("line",), "line: expected OWNER/NAME"),
    ):
        done = command(url, tmp_path / "home", *push, *arguments, **environment)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not server.repos


def test_a_path_stays_a_path(tmp_path):
    assert hub.local(tmp_path) == tmp_path
    assert hub.local("runs/hf/model.pth").as_posix() == "runs/hf/model.pth"
    assert not hub.is_remote("hf/model.pth")


def test_what_improve_found_is_published_and_loads_by_hand(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)

    def sample(model, seeds):
        return model(neon.ImageRng(seeds).normal((2,)))

    def loss(model, points, labels, generator):
        return (model(torch.randn(points.shape, generator=generator)) - points).square().mean(1)

    found = neon.improve(
        model,
        sample=sample,
        loss=loss,
        score=lambda points: points.var().item(),
        num_synth=20,
        updates=2,
        lr=1e-2,
        folder=tmp_path / "run",
    )
    publish(tmp_path / "run", tmp_path / "out")
    weights = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(value, found.weights[name]) for name, value in weights.items())
    assert "load_state_dict(load_file" in (tmp_path / "out/README.md").read_text()
