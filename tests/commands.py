"""Commands as users start them, alone or under torchrun, and the JSON object that they end with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[1]


def start(
    *command: object, ranks: int = 1, cwd: Path = ROOT, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """`python COMMAND`, or the same on several ranks of this machine."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    call = [sys.executable, *launcher, *map(str, command)]
    return subprocess.run(
        call, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout
    )


def started(*command: object, ranks: int = 1, cwd: Path = ROOT) -> dict:
    """What a command that succeeds prints last."""
    done = start(*command, ranks=ranks, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return last_object(done.stdout)


def invoke(command: click.Command, *arguments: object) -> Result:
    """A command in this process, successful or not."""
    return CliRunner().invoke(command, list(map(str, arguments)))


def last_object(stdout: str) -> dict:
    """The last line, the only JSON object there. Strict JSON: it knows no infinity (EDM's S_max is one by default) and
    no NaN."""
    *before, last = stdout.strip().splitlines()
    assert not any(line.startswith("{") for line in before), "one result, from rank 0"
    return json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@dataclass(frozen=True)
class FidCommand:
    """FAMILY/calculate_fid.py on the files of a folder, with a feature network that costs nothing."""

    family: str
    main: click.Command
    files: Mapping[str, str]
    """Option: name of the file in the folder."""

    def arguments(self, folder: Path, options: Sequence[object]) -> list[str]:
        defaults = {option: folder / name for option, name in self.files.items()} | {
            "--extractor": "tests.quarters_extractor:open_quarters"
        }
        chosen = [word for option, value in defaults.items() if option not in options for word in (option, str(value))]
        return [*chosen, "--device", "cpu", *map(str, options)]

    def invoke(self, folder: Path, *options: object) -> Result:
        """In this process, successful or not."""
        return CliRunner().invoke(self.main, self.arguments(folder, options))

    def here(self, folder: Path, *options: object) -> dict:
        """What it prints last in this process."""
        done = self.invoke(folder, *options)
        assert done.exit_code == 0, done.output
        return last_object(done.stdout)

    def outside(self, folder: Path, *options: object, ranks: int = 1) -> dict:
        """As users start it, from another folder. The tests are never installed: the script must find the project by
        itself."""
        script = ROOT / self.family / "calculate_fid.py"
        return started(script, *self.arguments(folder, options), ranks=ranks, cwd=folder)
