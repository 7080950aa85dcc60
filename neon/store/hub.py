"""hf://OWNER/NAME/FILE and hf://OWNER/NAME in place of a path: fetched once into huggingface_hub's cache, then a path.

What huggingface_hub obeys holds: HF_HOME (where the cache lies), HF_HUB_OFFLINE=1 (only the cache is asked), HF_TOKEN
(gated and private repositories), HF_ENDPOINT. Append @REVISION to the name for a branch, tag or commit.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

REMOTE = re.compile(r"hf:/{1,2}(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[^/]+))?(/(?P<file>.+))?$")
NOT_NEEDED = ["*.ckpt", "*.msgpack", "*.h5", "*.onnx*", "*.pb", "*.ot", "*.xml", "*.fp16.*", "*.non_ema.*"]
"""Copies of the weights in other formats or precisions, which repositories often hold beside the ones we read."""


def is_remote(path: str | Path) -> bool:
    """Whether a path names something on the Hub (a Path writes "hf://" as "hf:/")."""
    return str(path).startswith("hf:/")


def local(path: str | Path) -> Path:
    """The path itself, or where the file or repository that it names lies in the cache, fetched if it is not there.

    Raises ValueError for a malformed name, FileNotFoundError if there is no such file or it cannot be fetched.
    """
    if not is_remote(path):
        return Path(path)
    found = REMOTE.match(str(path))
    if found is None:
        raise ValueError(f"{path}: expected hf://OWNER/NAME/FILE, or hf://OWNER/NAME for a whole repository")
    return _fetched(found["repo"], found["revision"], found["file"])


@lru_cache
def _fetched(repo: str, revision: str | None, file: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    name = f"hf://{repo}" + (f"@{revision}" if revision else "") + (f"/{file}" if file else "")
    try:
        if file is None:
            return Path(huggingface_hub.snapshot_download(repo, revision=revision, ignore_patterns=NOT_NEEDED))
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name}: the repository is gated. Ask for access on its page, then log in with `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: the Hub has no such repository, or it is private (log in with `hf auth login` or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name}: the repository has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:  # before EntryNotFoundError, of which it is a kind
        from huggingface_hub import constants

        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise FileNotFoundError(
            f"{name}: it is not in the cache {constants.HF_HUB_CACHE}, and {why}. Fetch it where there is a network: "
            f"hf download {repo}{f' {file}' if file else ''}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{name}: the repository has no such file") from error
    except errors.HfHubHTTPError as error:
        raise OSError(f"{name}: the Hub answered with an error: {str(error).splitlines()[0]}") from error


def check_name(repo: str) -> None:
    """Raise ValueError if this is not OWNER/NAME."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"{repo}: expected OWNER/NAME, a model repository of the Hub")


def upload(folder: Path, repo: str, *, is_private: bool) -> str:
    """Upload a folder as the model repository OWNER/NAME, made if it is not there; returns its address.

    Raises ValueError for a malformed name, PermissionError if the Hub refuses the token or there is none, OSError
    otherwise.
    """
    check_name(repo)
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repo, private=is_private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="neon publish")
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise PermissionError(
                f"{repo}: the Hub refuses ({status}). Log in with `hf auth login` or set HF_TOKEN to a token "
                "that may write there"
            ) from error
        raise OSError(f"{repo}: the Hub answered with an error: {str(error).splitlines()[0]}") from error
    except errors.HTTPError as error:  # of the transport: no answer at all
        raise OSError(f"{repo}: the Hub cannot be reached: {error}") from error
    except errors.LocalTokenNotFoundError as error:
        raise PermissionError(f"{repo}: no token. Log in with `hf auth login` or set HF_TOKEN") from error
    return str(address)
