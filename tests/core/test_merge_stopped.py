"""A merge that is stopped: the old output stays, and nothing half-written stays for long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from neon.checkpoints import checkpoint

WORK = """
import sys, time
from pathlib import Path
from neon.checkpoints import one_pass
from neon.cli.main import main

real = one_pass.merge_piece
def slow(*given):
    Path(sys.argv[-1] + ".started").touch()
    time.sleep(60)
    return real(*given)
one_pass.merge_piece = slow
main()
"""


def start(tmp_path: Path, out: Path) -> subprocess.Popen:
    (tmp_path / "work.py").write_text(WORK)
    names = (str(tmp_path / "base.safetensors"), str(tmp_path / "synth.safetensors"))
    command = [sys.executable, str(tmp_path / "work.py"), "merge", *names, "--w", "1", "--out", str(out)]
    started = Path(f"{out}.started")
    started.unlink(missing_ok=True)
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    while not started.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert process.poll() is None
    return process


def leftovers(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_old_output_stays(tmp_path: Path, number: signal.Signals) -> None:
    for name, value in (("base", 1.0), ("synth", 2.0), ("out", 5.0)):
        checkpoint.write(tmp_path / f"{name}.safetensors", {"p": torch.full((3,), value)}, metadata={})
    out = tmp_path / "out.safetensors"
    before = out.read_bytes()
    other = start(tmp_path, out)
    process = start(tmp_path, out)
    process.send_signal(number)
    assert process.wait(30) != 0
    assert out.read_bytes() == before
    assert len(leftovers(tmp_path)) == (2 if number == signal.SIGKILL else 1)  # the other one is still at work
    checkpoint.convert(tmp_path / "base.safetensors", out, weights="auto")
    assert len(leftovers(tmp_path)) == 1  # what the killed one left is gone, what is in use is not
    other.kill()
    other.wait(30)
    checkpoint.convert(tmp_path / "base.safetensors", out, weights="auto")
    assert leftovers(tmp_path) == []
