"""Atomic writes, the folder lock, hashes."""

import subprocess
import sys

import pytest

from neon import files


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
from neon.files import folder_lock
with folder_lock(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "mine\n"
    with pytest.raises(files.FolderInUseError, match=f"in use by process {holder.pid} on "), files.folder_lock(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with files.folder_lock(tmp_path):
        pass


def test_a_folder_is_locked_against_its_own_process_too_and_free_after_the_block(tmp_path):
    with files.folder_lock(tmp_path / "new"), pytest.raises(files.FolderInUseError), files.folder_lock(tmp_path / "new"):
        pass
    with files.folder_lock(tmp_path / "new"):
        pass


def test_sha256_is_the_published_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert files.sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
