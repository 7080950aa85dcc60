"""Downloads against a server on the loopback interface; nothing leaves the machine."""

import hashlib
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edm.calculate_fid import main as edm_command
from fid.inception import WEIGHTS
from fid.weights import cache_folder
from imm.calculate_fid import main as imm_command
from neon.cli.download import download
from neon.cli.located import STATISTICS
from neon.published import fetch
from neon.published.fetch import DownloadError, NoNetworkError
from neon.published.table import GROUPS, TABLE, Published, select

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 4000  # about 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `pages` {path: (status, headers, content)}; `cut_after` ends that many answers early; remembers what was
    asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.cut_after: list[int] = []
        self.asked: list[tuple[str, str | None]] = []
        self.can_resume = True
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(is_head=True)

    def do_GET(self) -> None:
        self.answer(is_head=False)

    def answer(self, *, is_head: bool) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((f"{self.command} {self.path}", wanted))
        status, headers, content = self.server.pages.get(
            self.path, (404, {"X-Error-Code": "EntryNotFound"}, b"no such file")
        )
        is_unchanged = self.headers.get("If-Range") in (None, headers.get("ETag"))
        first = (
            int(re.match(r"bytes=(\d+)-", wanted)[1])
            if wanted and status == 200 and self.server.can_resume and is_unchanged
            else 0
        )
        if first and first >= len(content):
            status, headers, body = 416, {**headers, "Content-Range": f"bytes */{len(content)}"}, b""
        elif first:
            status, headers, body = (
                206,
                {**headers, "Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"},
                content[first:],
            )
        else:
            body = content
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(body[: self.server.cut_after.pop(0)] if self.server.cut_after else body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    running = Server()
    running.pages["/model.pkl"] = (200, {"ETag": '"1"'}, CONTENT)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def item(server):
    return Published(name="model.pkl", group="models", source=f"{server.url}/model.pkl", sha256=SHA256[:8])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_with_its_hash_and_is_skipped_the_next_time(tmp_path, server, item):
    got = fetch.fetch(item, tmp_path)
    path = tmp_path / "checkpoints" / "model.pkl"
    assert got == {
        "name": "model.pkl",
        "path": str(path),
        "status": "downloaded",
        "bytes": len(CONTENT),
        "sha256": SHA256,
    }
    assert path.read_bytes() == CONTENT
    assert names_in(path.parent) == ["model.pkl"]
    assert fetch.fetch(item, tmp_path)["status"] == "there"
    assert len(server.asked) == 1


@pytest.mark.parametrize("cuts", [[1000], [0], [300_000, 5, 400_000]])
def test_a_cut_connection_is_resumed_where_it_ended(tmp_path, server, item, cuts):
    server.cut_after = list(cuts)
    fetch.fetch(item, tmp_path)
    assert (tmp_path / "checkpoints" / "model.pkl").read_bytes() == CONTENT
    reached = [sum(cuts[: i + 1]) for i in range(len(cuts))]
    assert [wanted for _, wanted in server.asked] == [None, *(f"bytes={have}-" if have else None for have in reached)]


def test_a_killed_run_is_resumed_by_the_next_one(tmp_path, server, item):
    server.cut_after = [100_000] * fetch.ATTEMPTS
    with pytest.raises(
        DownloadError, match=r"400000 bytes are kept, the next run goes on from there\. By hand: fetch http"
    ):
        fetch.fetch(item, tmp_path)
    assert names_in(tmp_path / "checkpoints") == ["model.pkl.part", "model.pkl.part.etag"]
    assert fetch.fetch(item, tmp_path)["sha256"] == SHA256
    assert server.asked[-1][1] == "bytes=400000-"
    assert names_in(tmp_path / "checkpoints") == ["model.pkl"]


@pytest.mark.parametrize("reason", ["the file has changed", "the server cannot resume", "the part is too long"])
def test_a_part_that_cannot_be_continued_is_fetched_afresh(tmp_path, server, item, reason):
    part = tmp_path / "checkpoints" / "model.pkl.part"
    part.parent.mkdir()
    part.write_bytes(b"?" * (len(CONTENT) + 7 if reason == "the part is too long" else 5000))
    if reason == "the file has changed":
        part.with_name("model.pkl.part.etag").write_text('"0"')
    server.can_resume = reason != "the server cannot resume"
    assert fetch.fetch(item, tmp_path)["sha256"] == SHA256


def test_a_part_that_is_already_whole_is_only_renamed(tmp_path, server, item):
    part = tmp_path / "checkpoints" / "model.pkl.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    assert fetch.fetch(item, tmp_path)["sha256"] == SHA256


def test_a_wrong_hash_is_an_error_and_the_file_is_kept_aside(tmp_path, server, item):
    server.pages["/model.pkl"] = (200, {}, b"something else")
    with pytest.raises(
        DownloadError,
        match=rf"sent has sha256 [0-9a-f]{{64}}, expected {SHA256[:8]}\.\.\.; it is kept as .*model\.pkl\.wrong",
    ):
        fetch.fetch(item, tmp_path)
    assert names_in(tmp_path / "checkpoints") == ["model.pkl.wrong"]
    (tmp_path / "checkpoints" / "model.pkl").write_bytes(b"an older one")
    with pytest.raises(DownloadError, match=r"model\.pkl has sha256 .* Move it away"):
        fetch.fetch(item, tmp_path)
    assert (tmp_path / "checkpoints" / "model.pkl").read_bytes() == b"an older one"


def test_404_says_so_once_and_where_to_put_the_file(tmp_path, server, item):
    server.pages.clear()
    with pytest.raises(
        DownloadError, match=r"model\.pkl: 404: it was moved or renamed\. By hand: .*put it at .*checkpoints/model\.pkl"
    ):
        fetch.fetch(item, tmp_path)
    assert len(server.asked) == 1
    assert names_in(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
def test_an_html_page_is_not_taken_for_the_file(tmp_path, server, content_type):
    server.pages["/model.pkl"] = (200, {"Content-Type": content_type}, b"\n<!DOCTYPE html><title>Log in</title>")
    unknown = Published(name="model.pkl", group="models", source=f"{server.url}/model.pkl")
    with pytest.raises(DownloadError, match="HTML page, not the file"):
        fetch.fetch(unknown, tmp_path)
    assert not (tmp_path / "checkpoints" / "model.pkl").exists()


def test_an_html_page_does_not_destroy_the_part_that_is_there(tmp_path, server, item):
    server.cut_after = [100_000] * fetch.ATTEMPTS
    with pytest.raises(DownloadError):
        fetch.fetch(item, tmp_path)
    good = server.pages["/model.pkl"]
    server.pages["/model.pkl"] = (200, {"Content-Type": "text/html"}, b"<html>")
    with pytest.raises(DownloadError, match="HTML"):
        fetch.fetch(item, tmp_path)
    server.pages["/model.pkl"] = good
    assert fetch.fetch(item, tmp_path)["sha256"] == SHA256


def test_a_busy_server_is_asked_again_and_not_for_ever(tmp_path, server, item):
    server.pages["/model.pkl"] = (503, {}, b"busy")
    with pytest.raises(DownloadError, match="the server says 503"):
        fetch.fetch(item, tmp_path)
    assert len(server.asked) == fetch.ATTEMPTS


def test_without_a_network_or_offline_the_message_says_what_to_do(tmp_path, server, item, monkeypatch):
    nowhere = Published(name="model.pkl", group="models", source="http://127.0.0.1:9/model.pkl")
    with pytest.raises(DownloadError, match=r"could not be fetched .* no network\?\. By hand: fetch http"):
        fetch.fetch(nowhere, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set: nothing is downloaded"):
        fetch.fetch(item, tmp_path)
    assert server.asked == []
    (tmp_path / "checkpoints" / "model.pkl").write_bytes(CONTENT)
    assert fetch.fetch(item, tmp_path)["status"] == "there"


@pytest.fixture
def no_names(monkeypatch) -> list[str]:
    """A machine without a network: no name resolves. Remembers which were asked for."""
    asked: list[str] = []

    def getaddrinfo(host: str, *arguments: object, **options: object) -> None:
        asked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for variable in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    return asked


def test_a_name_that_does_not_resolve_is_an_error_at_once(tmp_path, no_names):
    for name in ("kl16", "edm-ffhq-64x64-uncond-vp"):
        (item,) = select([name], [])
        with pytest.raises(NoNetworkError, match=r"the name [\w.-]+ cannot be resolved .*By hand: fetch https://"):
            fetch.fetch(item, tmp_path)
    assert no_names == ["huggingface.co", "nvlabs-fi-cdn.nvidia.com"]


def test_without_a_network_each_server_is_asked_for_once(tmp_path, no_names):
    """Not five times for each of thirteen files; every file's way by hand is still said."""
    done = CliRunner().invoke(download, ["--models", "--bases", "--root", str(tmp_path)])
    assert done.exit_code == 1
    assert no_names == ["huggingface.co", "nvlabs-fi-cdn.nvidia.com", "github.com"]
    failed = json.loads(done.stdout.splitlines()[-1])["failed"]
    assert len(failed) == len(select([], ["models", "bases"]))
    assert all("By hand: fetch https://" in row["error"] for row in failed)
    assert sum("cannot be resolved" in row["error"] for row in failed) == 3


def test_a_proxy_resolves_names_itself(tmp_path, no_names, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    (item,) = select(["edm-ffhq-64x64-uncond-vp"], [])
    fetch.check_name(item, tmp_path / "x")
    assert no_names == []


def run(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(tmp_path / "hf"),
        **environment,
    }
    command = ["bash", str(ROOT / "download_models.sh"), "--root", str(tmp_path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)


def test_the_script_fetches_hub_files_and_says_404(tmp_path, server):
    """huggingface_hub itself, against a server that answers as the Hub does."""
    headers = {"ETag": '"abc"', "X-Repo-Commit": "0" * 40}
    server.pages["/sinaalemohammad/Neon/resolve/main/adm_in256_stats.npz"] = (200, headers, CONTENT)
    done = run(tmp_path, "adm_in256_stats", "adm_in512_stats.npz", HF_ENDPOINT=server.url)
    assert done.returncode == 1
    result = json.loads(done.stdout.splitlines()[-1])
    path = tmp_path / "fid_stats" / "adm_in256_stats.npz"
    assert result["files"] == [
        {"name": path.name, "path": str(path), "status": "downloaded", "bytes": len(CONTENT), "sha256": SHA256}
    ]
    assert path.read_bytes() == CONTENT
    (failed,) = result["failed"]
    assert failed["name"] == "adm_in512_stats.npz"
    assert "404: the Hub has no sinaalemohammad/Neon/adm_in512_stats.npz" in failed["error"]
    assert f"fetch {server.url}/sinaalemohammad/Neon/resolve/main/adm_in512_stats.npz" in failed["error"]
    assert "\r" not in done.stderr  # no progress bar where nobody is looking


def test_the_hub_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries again for half a minute
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (item,) = select(["kl16"], [])
    with pytest.raises(
        DownloadError,
        match=r"the Hub could not be reached for xwen99/mar-vae-kl16/kl16\.ckpt .*By hand: fetch http://127\.0\.0\.1:9/",
    ):
        fetch.fetch(item, tmp_path)


def test_the_script_names_missing_modules(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    done = run(tmp_path, "kl16", PYTHON=str(bare))
    assert done.returncode == 1
    assert "No module named 'click'" in done.stderr
    assert "Run: pip install -e ." in done.stderr


def test_names_groups_and_the_table():
    models = select([], ["models"])
    assert len(models) == 8 + 3 + 2  # checkpoints, autoencoders, statistics
    assert {item.name for item in models} >= {
        "Neon_xARL_imagenet256.pth",
        "Neon_imm_imagenet256.pkl",
        "adm_in512_stats.npz",
    }
    assert [item.name for item in select(["var_d16", "var_d16.pth"], [])] == ["var_d16.pth"]
    assert [item.name for item in select(["otcfm_cifar10_weights_step_400000"], [])] == [
        "otcfm_cifar10_weights_step_400000.pt"
    ]
    with pytest.raises(ValueError, match=r"no published file 'var_d17'; did you mean var_d16\.pth"):
        select(["var_d17"], [])
    (other,) = select(["https://example.org/releases/1.0/weights.pt?download=1"], [])
    assert other.target(Path()) == Path("checkpoints/weights.pt")
    targets = [item.target(Path()) for item in TABLE]
    assert len(set(targets)) == len(targets)
    (inception,) = select([WEIGHTS.files[0]], [])
    assert inception.sha256 == "6726825d"
    assert all(item.group in GROUPS and item.source.startswith(("hub:", "https://")) for item in TABLE)


def test_list_fetches_nothing_and_says_what_is_there(tmp_path):
    (tmp_path / "fid_stats").mkdir()
    (tmp_path / "fid_stats" / "cifar10-32x32.npz").write_bytes(b"PK")
    done = CliRunner().invoke(download, ["--list", "--root", str(tmp_path)])
    assert done.exit_code == 0
    assert [
        row["name"]
        for row in json.loads(done.stdout.splitlines()[-1])
        if row["there"] and row["path"].startswith(str(tmp_path))
    ] == ["cifar10-32x32.npz"]


ADDRESS = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz"


@pytest.fixture
def statistics(tmp_path, monkeypatch) -> bytes:
    """A machine that reaches NVIDIA's server, which sends these statistics; no file is here yet."""
    np.savez(tmp_path / "sent.npz", mu=np.zeros(4), sigma=np.eye(4))
    content = (tmp_path / "sent.npz").read_bytes()
    monkeypatch.setattr(fetch, "check_name", lambda item, target: None)
    monkeypatch.setattr(
        fetch, "fetch_url", lambda item, target: target.write_bytes(content) if item.source == ADDRESS else None
    )
    monkeypatch.setenv("NEON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    return content


def located(value: str) -> Path:
    return STATISTICS.convert(value, None, None)


def test_an_address_as_reference_is_downloaded_to_the_cache_once(tmp_path, statistics, monkeypatch):
    path = located(ADDRESS)
    assert path == tmp_path / "cache" / "cifar10-32x32.npz"
    assert path.read_bytes() == statistics
    monkeypatch.setattr(fetch, "fetch_url", lambda item, target: pytest.fail("a second download"))
    assert located(ADDRESS) == path


def test_the_local_file_of_that_name_serves_for_the_address(tmp_path, statistics):
    (tmp_path / "fid_stats").mkdir()
    (tmp_path / "fid_stats/cifar10-32x32.npz").write_bytes(b"PK here")
    assert located(ADDRESS) == Path("fid_stats/cifar10-32x32.npz")
    assert not (tmp_path / "cache").exists()


def test_the_authors_command_takes_the_address(tmp_path, statistics):
    """edm/calculate_fid.py as NVIDIA's README writes it: it comes as far as the reference's features."""
    (tmp_path / "model.pkl").write_bytes(b"")
    command = [
        "--network_pkl",
        "model.pkl",
        f"--ref={ADDRESS}",
        "--extractor",
        "tests.quarters_extractor:open_quarters",
    ]
    done = CliRunner().invoke(edm_command, [*command, "--device", "cpu"])
    assert done.exit_code == 1
    assert "cifar10-32x32.npz" in done.stderr, "the reference of 4 features is refused by name"


def test_a_missing_checkpoint_is_said_with_its_near_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    command = ["--model_ckpt", "checkpoints/Neon_IMM_imagenet256.pth", "--fid_stats", "stats.npz"]
    done = CliRunner().invoke(imm_command, command)
    assert done.exit_code == 1
    assert done.stderr == (
        "Error: --model_ckpt: there is no checkpoints/Neon_IMM_imagenet256.pth; a published file is called "
        "Neon_imm_imagenet256.pkl: neon download Neon_imm_imagenet256.pkl\n"
    )
    (tmp_path / "checkpoints/Neon_imm_imagenet256.pkl").write_bytes(b"")
    done = CliRunner().invoke(imm_command, command)
    assert "did you mean checkpoints/Neon_imm_imagenet256.pkl?" in done.stderr


def test_https_is_never_left_by_a_redirect():
    request = urllib.request.Request("https://example.org/a.npz")
    headers = http.client.HTTPMessage()
    follow = fetch.StayEncrypted().redirect_request
    with pytest.raises(fetch.DownloadError, match=r"redirects to http://example\.org/b, which is not encrypted"):
        follow(request, io.BytesIO(), 302, "Found", headers, "http://example.org/b")
    found = follow(request, io.BytesIO(), 302, "Found", headers, "https://example.org/b")
    assert found.full_url == "https://example.org/b"
    assert any(isinstance(handler, fetch.StayEncrypted) for handler in fetch._OPENER.handlers)


def test_a_user_without_a_home_folder_gets_help_and_a_line(monkeypatch):
    """HOME is not set and the user has no entry in the password file."""
    code = """
import pathlib, sys
def homeless():
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = homeless
from neon.cli.main import main
main()
"""
    line = "Error: this user has no home folder: set NEON_CACHE to a folder for fetched files\n"
    for words, expected in ((["--help"], ""), (["run", "--help"], ""), (["download", "--list"], line)):
        command = [sys.executable, "-c", code, *words]
        environment = {name: value for name, value in os.environ.items() if name != "NEON_CACHE"}
        assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stderr == expected

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NEON_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(FileNotFoundError, match="this user has no home folder: set NEON_CACHE"):
        cache_folder()
