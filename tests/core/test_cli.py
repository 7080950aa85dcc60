"""The command line as a whole: what it offers, how fast it answers, how it speaks."""

import json
import logging
import os
import subprocess
import sys

import click
import pytest
import torch
from click.testing import CliRunner

from neon import own_code
from neon.cli.main import main
from neon.cli.messages import PlainCommand
from neon.cli.published_flags import published_command
from tests.commands import ROOT
from tests.core.cli_listing import FAMILIES, lines, listing

LISTING = ROOT / "tests/core/cli_listing.txt"


def test_commands_and_options_change_on_purpose_only():
    """If this fails and the change is wanted: python -m tests.core.cli_listing > tests/core/cli_listing.txt"""
    assert listing().splitlines() == LISTING.read_text().splitlines()


def leaves(group: click.Group, path: str) -> list[tuple[str, click.Command]]:
    found = []
    for name, command in group.commands.items():
        inner = f"{path} {name}"
        found += leaves(command, inner) if isinstance(command, click.Group) else [(inner, command)]
    return found


LEAVES = leaves(main, "neon")


def test_one_spelling():
    """What a command writes is called --out, never an argument; every command that runs on ranks can wait for them."""
    for path, command in LEAVES:
        options = {word for parameter in command.params for word in parameter.opts}
        assert not {"out", "output", "--output", "-o"} & options, path
        runs_on_ranks = "--device" in options and path not in ("neon check", "neon sample")  # one process
        assert runs_on_ranks == ("--timeout" in options), path
    names = [path for path, _ in LEAVES]
    assert "neon search" in names
    assert "neon grid" not in names
    assert [path for path in names if path.endswith("info")] == ["neon info"]


def test_every_command_explains_itself():
    """A sentence for each command and each option; the published commands too."""
    for path, command in LEAVES:
        assert command.help, path
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{path} {option.opts}"
    assert all(any(name in line for line in listing().splitlines()) for name in FAMILIES)


def test_out_says_what_becomes_of_a_file_that_is_there():
    """Where one file is written it is replaced, as by cp; a folder of images or code is not. Those that go on in their
    folder are no concern here."""
    kept = {"neon sample", "neon example"}
    goes_on = {"neon publish", "neon download"} | {
        path for path, command in LEAVES if "config" in {p.name for p in command.params}
    }
    for path, command in LEAVES:
        for option in command.params:
            if "--out" in option.opts and path not in goes_on:
                assert ("never replaced" if path in kept else "is replaced, once") in option.help, path


SLOW_TO_IMPORT = {"torch", "torchvision", "numpy", "scipy", "PIL", "timm", "huggingface_hub", "matplotlib", "diffusers"}


@pytest.mark.parametrize("words", ["", "run --", "fid calc --met", "download --"])
def test_help_and_completion_import_nothing_slow(words):
    """What a person waits for are imports; without these the answer takes about a quarter of a second."""
    code = "import sys; from neon.cli.main import main\ntry: main(prog_name='neon')\n"
    code += "finally: print(*sorted(sys.modules), file=sys.stderr)"
    arguments = ["--help"] if not words else []
    complete = {"_NEON_COMPLETE": "bash_complete", "COMP_WORDS": f"neon {words}", "COMP_CWORD": str(len(words.split()))}
    environment = {**os.environ, **(complete if words else {})}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    imported = done.stderr.splitlines()[-1].split()
    assert not SLOW_TO_IMPORT & set(imported)
    assert len(imported) < 300
    assert ("finetune" if not words else words.split()[-1]) in done.stdout


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, FloatingPointError, ImportError])
@pytest.mark.parametrize("kind", ["verb", "published"])
def test_a_users_mistake_is_one_line_whoever_raises_it(error, kind, monkeypatch):
    monkeypatch.setattr(own_code, "is_own", lambda file: False)  # as if this function were one of the project

    def fails() -> None:
        raise error("expected this, found that")

    command = click.command(cls=PlainCommand)(fails) if kind == "verb" else published_command()(fails)
    done = CliRunner().invoke(command)
    assert done.exit_code == 1
    assert done.stderr == "Error: expected this, found that\n"


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(own_code, "is_own", lambda file: False)

    @click.command(cls=PlainCommand)
    def fails() -> None:
        raise KeyError("a bug")

    assert isinstance(CliRunner().invoke(fails).exception, KeyError)


def test_warnings_of_library_and_commands_go_through_one_channel(tmp_path):
    """A prefix that the reader drops is said by the library, at the command line once."""
    torch.save({"module.weight": torch.ones(2)}, tmp_path / "a.pth")
    arguments = ["convert", str(tmp_path / "a.pth"), "--out", str(tmp_path / "b.safetensors")]
    for _ in range(2):  # no handler is left behind
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        assert done.stderr == f"warning: {tmp_path / 'a.pth'}: dropped the prefix module. of its names\n"
        assert json.loads(done.stdout)["out"] == str(tmp_path / "b.safetensors")
    assert logging.getLogger("neon").handlers == []


def test_a_warning_comes_from_rank_0_alone(monkeypatch):
    @click.command(cls=PlainCommand)
    def warns() -> None:
        logging.getLogger("neon.somewhere").warning("this may matter")

    assert CliRunner().invoke(warns).stderr == "warning: this may matter\n"
    monkeypatch.setenv("RANK", "1")
    assert CliRunner().invoke(warns).stderr == ""


def test_the_listing_sees_a_new_option():
    @click.command()
    @click.option("--new", type=click.Choice(["a", "b"]), default="a")
    def command(new: str) -> None: ...

    assert list(lines("x", command)) == ["x", "    --new a|b, default a"]
