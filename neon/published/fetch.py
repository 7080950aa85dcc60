"""A download that resumes, verifies and explains itself.

    neon download --list
    neon download                       # what the eight published commands need, besides --refs
    neon download --refs --bases        # EDM's statistics and the FID Inception; base models
    neon download kl16.ckpt             # one file

Hub files go through huggingface_hub (HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 forbids the network), others through
plain https, by code of our own: pooch and torch.hub.download_url_to_file do not resume.
`bash download_models.sh` is the same without an installation.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import replace
from http.client import HTTPMessage
from pathlib import Path
from typing import IO

from tqdm import tqdm

from fid.weights import cache_folder
from neon.published.table import Published, select
from neon.store import files

ATTEMPTS = 4
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60


class DownloadError(OSError):
    """A file could not be fetched, or what came is not the file; the message says what to do."""


class NoNetworkError(DownloadError):
    """The name of a server cannot be resolved: trying again, or another file of the same server, is of no use."""


def fetch(item: Published, root: Path) -> dict[str, object]:
    """Make sure that a file is there and is the right one: {name, path, status: "there" or "downloaded", bytes,
    sha256}.

    Raises DownloadError. A file with a wrong hash is kept aside under NAME.wrong, a part of a file under NAME.part.
    """
    target = item.target(root)
    status = "there" if target.is_file() else "downloaded"
    if status == "downloaded":
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_offline():
            raise DownloadError(f"HF_HUB_OFFLINE is set: nothing is downloaded. {by_hand(item, target)}")
        check_name(item, target)
        fetch_hub(item, target) if item.source.startswith("hub:") else fetch_url(item, target)
    sha256 = check(item, target, status)
    return {"name": item.name, "path": str(target), "status": status, "bytes": target.stat().st_size, "sha256": sha256}


def fetched_address(url: str) -> Path:
    """The file at an https address: the one that lies where the table puts it, or one in the cache folder, to which it
    is downloaded once, whichever of several ranks comes first. Raises DownloadError."""
    (item,) = select([url], [])
    if (here := item.target(Path())).is_file():
        return here
    cached = replace(item, folder=str(cache_folder()))
    cache_folder().mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / f".{item.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Path(str(fetch(cached, Path())["path"]))


def check(item: Published, target: Path, status: str) -> str | None:
    """The hash of a new file, or of one whose hash is known; raises if it is not what it should be, and moves a new one
    aside."""
    with open(target, "rb") as file:
        is_page = file.read(64).lstrip().startswith(b"<")
    sha256 = files.sha256_of(target) if item.sha256 or status == "downloaded" else None
    if not is_page and (sha256 or "").startswith(item.sha256):
        return sha256
    what = (
        "is an HTML page, not the file: an error or login page was saved"
        if is_page
        else f"has sha256 {sha256}, expected {item.sha256}..."
    )
    if status == "downloaded":
        aside = target.with_name(target.name + ".wrong")
        os.replace(target, aside)
        raise DownloadError(f"what {item.source} sent {what}; it is kept as {aside}. {by_hand(item, target)}")
    raise DownloadError(f"{target} {what}. Move it away and run this again")


def host_of(item: Published) -> str:
    """The server of a file."""
    return urllib.parse.urlsplit(hub_endpoint() if item.source.startswith("hub:") else item.source).hostname or ""


def hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def check_name(item: Published, target: Path) -> None:
    """Raise NoNetworkError at once if the server's name cannot be resolved. (A proxy resolves names itself.)"""
    host = host_of(item)
    if urllib.request.getproxies().get("https") and not urllib.request.proxy_bypass(host):
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise NoNetworkError(
            f"{item.name}: the name {host} cannot be resolved ({error}): no network, or none to there. "
            f"{by_hand(item, target)}"
        ) from error


def fetch_hub(item: Published, target: Path) -> None:
    """By huggingface_hub: resumes, uses the user's own login for gated files, HF_ENDPOINT for mirrors."""
    from huggingface_hub import errors, hf_hub_download, utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    repository = item.source.removeprefix("hub:")
    try:
        hf_hub_download(repository, item.name, local_dir=target.parent, endpoint=os.environ.get("HF_ENDPOINT"))
    except errors.LocalEntryNotFoundError as error:
        raise DownloadError(
            f"the Hub could not be reached for {repository}/{item.name} (no network?). {by_hand(item, target)}"
        ) from error
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repository} asks for a login: accept its terms on the Hub, run `hf auth login`. {by_hand(item, target)}"
        ) from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        raise DownloadError(
            f"404: the Hub has no {repository}/{item.name}; it was moved or renamed. {by_hand(item, target)}"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise DownloadError(
            f"{repository}/{item.name}: {str(error).splitlines()[0]}. {by_hand(item, target)}"
        ) from error


def fetch_url(item: Published, target: Path) -> None:
    """By https into NAME.part, going on where an earlier attempt stopped; renamed when it is whole."""
    part = target.with_name(target.name + ".part")
    for attempt in range(ATTEMPTS):
        try:
            download_rest(item.source, part)
            break
        except DownloadError as error:
            raise DownloadError(f"{error}. {by_hand(item, target)}") from error
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == ATTEMPTS - 1:
                reason = (
                    "404: it was moved or renamed"
                    if error.code == 404
                    else f"the server says {error.code} {error.reason}"
                )
                raise DownloadError(f"{item.source}: {reason}. {by_hand(item, target)}") from error
        except (OSError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS - 1:
                kept = (
                    f"{part.stat().st_size} bytes are kept, the next run goes on from there"
                    if part.is_file()
                    else "no network?"
                )
                raise DownloadError(
                    f"{item.source} could not be fetched ({error}); {kept}. {by_hand(item, target)}"
                ) from error
        time.sleep(attempt)
    os.replace(part, target)
    part.with_name(part.name + ".etag").unlink(missing_ok=True)


class StayEncrypted(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to anything else."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise DownloadError(f"{req.full_url} redirects to {newurl}, which is not encrypted: not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(StayEncrypted)


def download_rest(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`; start again if the server cannot resume or the file there has
    changed."""
    tag_file = part.with_name(part.name + ".etag")
    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": "neon-generative"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag_file.is_file():
            headers["If-Range"] = tag_file.read_text()
    try:
        response = _OPENER.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # the earlier attempt had got everything
        part.unlink()
        raise ConnectionError("the part that was there does not belong to this file; starting again") from error
    with response:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError(
                f"{url} answers with an HTML page, not the file: an error or login page (nothing of it was kept)"
            )
        if response.status == 206 and not response.headers["Content-Range"].startswith(f"bytes {have}-"):
            raise ConnectionError(f"asked for the file from byte {have}, got {response.headers['Content-Range']}")
        have = have if response.status == 206 else 0
        total = have + int(response.headers["Content-Length"]) if response.headers["Content-Length"] else None
        tag = response.headers["ETag"] or ""
        tag_file.write_text(tag) if tag.startswith('"') else tag_file.unlink(missing_ok=True)
        bar = tqdm(
            total=total,
            initial=have,
            desc=part.stem,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            leave=False,
        )
        with open(part, "ab" if have else "wb") as file, bar:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"the connection was cut after {part.stat().st_size} of {total} bytes")


def by_hand(item: Published, target: Path) -> str:
    """What to do where the network does not reach."""
    url = (
        f"{hub_endpoint()}/{item.source.removeprefix('hub:')}/resolve/main/{item.name}"
        if item.source.startswith("hub:")
        else item.source
    )
    return f"By hand: fetch {url} on another machine and put it at {target}"


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
