"""Atomic writes, the folder lock, hashes."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from neon.checkpoints import checkpoint
from neon.store import files, records, shards


def test_a_reader_sees_the_old_content_until_the_block_ends_and_the_new_one_after(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with files.replacing(path) as stream:
        stream.write(b"new, and longer")
        stream.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new, and longer"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def interrupted() -> None:
        with files.replacing(path) as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_an_open_reader_keeps_the_file_it_opened(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with path.open() as reader:
        files.write_text(path, "new")
        assert reader.read() == "old"


def test_writing_into_a_folder_that_is_not_there_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        files.write_text(tmp_path / "nowhere" / "a", "x")


def test_replacing_keeps_the_permissions_that_the_umask_gives(tmp_path):
    (tmp_path / "plain").write_text("x")
    files.write_text(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    code = """
import sys, pathlib
from neon.store.files import folder_lock
with folder_lock(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "mine\n"
    with (
        pytest.raises(files.FolderInUseError, match=f"in use by process {holder.pid} on "),
        files.folder_lock(tmp_path),
    ):
        pass
    holder.kill()
    holder.communicate()
    with files.folder_lock(tmp_path):
        pass


def test_a_folder_is_locked_against_its_own_process_too_and_free_after_the_block(tmp_path):
    with (
        files.folder_lock(tmp_path / "new"),
        pytest.raises(files.FolderInUseError),
        files.folder_lock(tmp_path / "new"),
    ):
        pass
    with files.folder_lock(tmp_path / "new"):
        pass


def test_sha256_is_the_published_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert files.sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """The kernel refuses to write past `size` bytes of any file, as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


WRITERS = {
    "state.pt": lambda path, n: records.save_state({"a": torch.zeros(n)}, path),
    "manifest.json": lambda path, n: records.write_json([0] * n, path),
    "shard.npz": lambda path, n: shards.write_shard(path, torch.zeros(1, n), None, [0]),
    "model.safetensors": lambda path, n: checkpoint.write(path, {"a": torch.zeros(n)}, metadata={}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_with_the_path_and_leaves_the_old_file(tmp_path, name):
    write, path = WRITERS[name], tmp_path / name
    write(path, 10)
    old = path.read_bytes()
    with (
        no_file_longer_than(5000),
        pytest.raises(OSError, match=f"File too large while it was written.*before is kept.*{name}"),
    ):
        write(path, 100_000)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_no_half_file_where_none_was(tmp_path, name):
    with no_file_longer_than(5000), pytest.raises(OSError, match="no half of it is left"):
        WRITERS[name](tmp_path / name, 100_000)
    assert not list(tmp_path.iterdir())


def test_a_line_that_finds_no_room_names_its_file_and_costs_no_earlier_line(tmp_path):
    path = tmp_path / "points.jsonl"
    records.append_line(path, {"w": 1})
    with no_file_longer_than(1000), pytest.raises(OSError, match=r"File too large while it was written.*points\.jsonl"):
        records.append_line(path, {"w": [2] * 1000})
    records.repair_lines(path)
    records.append_line(path, {"w": 3})
    assert records.read_lines(path) == [{"w": 1}, {"w": 3}]


def test_an_unwritable_folder_is_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)  # the rights of a folder mean nothing to root
    try:
        with pytest.raises(PermissionError, match="run"), files.folder_lock(folder):
            pass
        with pytest.raises(PermissionError, match="run"):
            files.write_text(folder / "result.json", "x")
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)
    assert not list(folder.iterdir())


def test_the_next_owner_of_a_folder_removes_the_halves_that_a_kill_left(tmp_path):
    """Only files that `replacing` itself names so; a killed writer cannot remove its own."""
    code = """
import os, pathlib, signal, sys
from neon.store.files import replacing
with replacing(pathlib.Path(sys.argv[1])) as stream:
    stream.write(b"half")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "synth").mkdir()
    others = [tmp_path / "notes.tmp", tmp_path / "synth/.hidden.tmp"]
    for other in others:
        other.write_text("mine")
    for path in (tmp_path / "result.json", tmp_path / "synth/shard.npz"):
        subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert len(list(tmp_path.rglob("*.tmp"))) == 4
    with files.folder_lock(tmp_path):
        assert sorted(tmp_path.rglob("*.tmp")) == sorted(others)


def test_saving_takes_a_twentieth_of_the_time(tmp_path, monkeypatch):
    """On a clock where a save takes 2 s and a step 1 s: saves start at least 40 s apart, and the first is not put
    off."""
    clock = [0.0]
    monkeypatch.setattr(records.time, "monotonic", lambda: clock[0])
    saver = records.Saver(tmp_path / "state.pt")
    saved_at = []

    def slow_save(state: object, path: object) -> None:
        saved_at.append(clock[0])
        clock[0] += 2

    monkeypatch.setattr(records, "save_state", slow_save)
    while clock[0] < 200:
        clock[0] += 1
        if saver.is_due:
            saver.save({})
    assert saved_at == [1.0, 44.0, 87.0, 130.0, 173.0]


def test_a_folder_from_before_a_key_was_renamed_goes_on(tmp_path):
    now = {"finetune": {"lr": 1e-6, "objective": {"a": 2.0, "label_drop": 0.1}, "arch": {"label_dropout": 0.3}}}
    before = {"recipe": {**now["finetune"], "objective": {"a": 2.0, "label_dropout": 0.1}}}
    records.check_same(before, now, tmp_path)
    records.check_same({"recipe": {"lr": 1.0}, "data": {}}, {"train": {"lr": 1.0}, "data": {}}, tmp_path)
    other = {"recipe": {**now["finetune"], "objective": {"a": 2.0, "label_dropout": 0.2}}}
    with pytest.raises(ValueError, match=r": finetune\.objective\.label_drop is 0\.2 there and 0\.1 now"):
        records.check_same(other, now, tmp_path)
    with pytest.raises(ValueError, match=r": finetune\.arch\.label_dropout is 0\.3 there and 0\.4 now"):
        records.check_same(now, {"finetune": {**now["finetune"], "arch": {"label_dropout": 0.4}}}, tmp_path)


def test_a_file_in_the_place_of_a_run_folder_is_said(tmp_path):
    (tmp_path / "mine.py").write_text("")
    for folder in (tmp_path / "mine.py", tmp_path / "mine.py" / "run"):
        with pytest.raises(OSError, match="cannot be a folder: a file is in its place"), files.folder_lock(folder):
            pass
