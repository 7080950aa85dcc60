"""What a waiting person sees, and what happens when that person closes the terminal or presses Ctrl-C."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neon.runtime import progress as module
from neon.runtime.distributed import World, world
from neon.runtime.progress import Countdown, duration, progress
from tests.commands import ROOT
from tests.core.test_run import hears_interrupts, run, start, without_times


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_one_line_a_minute_without_a_terminal(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    bar = progress(total=50_000, desc="synth", unit="img", world=World(), initial=10_000)
    for _ in range(13):  # 100 images in 10 s
        clock.now += 10
        bar.update(100, note="loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "synth: 10,600 of 50,000 img (21 %), 10 img/s, 66 min left, loss 0.5",
        "synth: 11,200 of 50,000 img (22 %), 10 img/s, 65 min left, loss 0.5",
    ]


def test_other_ranks_are_silent(monkeypatch, capsys):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    progress(total=10, desc="synth", unit="img", world=World(rank=1, size=2)).update(3)
    assert capsys.readouterr().err == ""


def test_a_line_is_written_in_one_piece(monkeypatch):
    """Ctrl-C between a line and its end glued the last words to it: "(0 s)stopped. What was made is kept"."""
    pieces: list[str] = []
    monkeypatch.setattr(module.sys, "stderr", io.StringIO())
    monkeypatch.setattr(module.sys.stderr, "write", pieces.append)
    module.say(World(), "synth: found 50 of 50 images")
    assert [piece for piece in pieces if piece] == ["synth: found 50 of 50 images\n"]


def test_a_grid_says_which_point_it_is_at_and_how_long_the_rest_takes(line_config, tmp_path, capsys):
    countdown = Countdown(3)
    assert [countdown.passed(s) for s in (0, 3600, 1800)] == [
        "point 1 of 3",
        "point 2 of 3, 60 min left",
        "point 3 of 3",
    ]
    assert countdown.is_over
    run(line_config, tmp_path / "run", "finetune.snapshot_images=96")
    said = [line.strip().split(",")[0] for line in capsys.readouterr().err.splitlines() if "point " in line]
    assert said == [f"point {i} of 9" for i in range(1, 10)]  # 4 values of w at 2 guidances, and the random direction


def test_durations():
    found = [duration(seconds) for seconds in (45, 90, 3599, 5399, 5400, 172_799, 172_800)]
    assert found == ["45 s", "2 min", "60 min", "90 min", "1.5 h", "48.0 h", "2.0 days"]


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_a_closed_or_full_stderr_does_not_stop_a_run(line_config, tmp_path, stderr):
    command = f"{sys.executable} -m neon run {line_config} --out {tmp_path}/run --device cpu {stderr}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert set(json.loads(done.stdout)["rows"]) == {"base", "self-trained", "random direction", "neon"}


LONG = "report.num_images=10000"
"""The run is still at work when the signal comes, however fast the machine."""


def interrupted(process: subprocess.Popen, folder: Path, number: int) -> tuple[int, str]:
    while process.poll() is None and not (folder / "ledger.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_does(line_config, tmp_path, number):
    whole = run(line_config, tmp_path / "whole", LONG)
    code, errors = interrupted(start(line_config, tmp_path / "run", LONG), tmp_path / "run", number)
    assert code == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "stopped. What was made is kept: run the same command to go on"
    process = start(line_config, tmp_path / "run", LONG)
    _, errors = process.communicate()
    assert "synth: found 50 of 50 images" in errors
    assert "finetune: found finished" in errors
    found = json.loads((tmp_path / "run/result.json").read_text())
    assert without_times(found) == without_times(json.loads(json.dumps(whole)))


def test_ranks_that_are_interrupted_say_so_once_and_without_a_traceback_of_ours(line_config, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "neon", "run"]
    process = subprocess.Popen(
        [*command, line_config, "--out", tmp_path / "run", "--device", "cpu", "--set", LONG],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hears_interrupts,
    )
    while process.poll() is None and not (tmp_path / "run/ledger.jsonl").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal sends it: to torchrun and to every rank
    _, errors = process.communicate(timeout=120)
    assert errors.count("run the same command to go on") == 1
    assert "neon/" not in errors.split("Traceback", 1)[-1] or "Traceback" not in errors


@pytest.mark.parametrize("device", ["foo", "cuda:x", ""])
def test_an_unknown_device_is_a_line(device):
    with pytest.raises(ValueError, match=f"--device {device}: no such device; use cpu"), world(device):
        pass


@pytest.mark.parametrize("timeout", [-1, 0, float("inf"), float("nan"), 1e30])
def test_an_absurd_timeout_is_a_line(timeout):
    with pytest.raises(ValueError, match="--timeout must be > 0"), world("cpu", timeout):
        pass
