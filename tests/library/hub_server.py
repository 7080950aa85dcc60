"""A stand-in for the Hub's API on the loopback interface: repositories in memory, downloads, commits, LFS uploads."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"


class Hub(ThreadingHTTPServer):
    """repos: OWNER/NAME -> {file: bytes}. requests: what was asked, as "GET /path"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = file.groups()
            if repo not in self.server.repos:
                return self.missing("RepoNotFound")
            if revision not in ("main", commit(self.server.repos[repo])):
                return self.missing("RevisionNotFound")
            content = self.server.repos[repo].get(name)
            if content is None:
                return self.missing("EntryNotFound")
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(200, content, ETag=etag, X_Repo_Commit=commit(self.server.repos[repo]))
        if about := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            files = self.server.repos.get(about[1])
            if files is None:
                return self.missing("RepoNotFound")
            siblings = [{"rfilename": name} for name in files]
            return self.answer_json({"id": about[1], "sha": commit(files), "siblings": siblings, "private": False})
        if tree := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            files = self.server.repos.get(tree[1], {})
            entries = [{"type": "file", "path": n, "size": len(c), "oid": oid(c)} for n, c in files.items()]
            return self.answer_json(entries)
        return self.missing("EntryNotFound")

    def missing(self, code: str) -> None:
        self.answer(404, b"", **{"X-Error-Code": code, "X-Error-Message": code})

    def do_PUT(self) -> None:
        self.server.requests.append(f"PUT {self.path}")
        self.server.blobs[self.path.removeprefix("/blob/")] = self.body()
        self.answer(200)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"POST {path}")
        content = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, b"", **{"X-Error-Message": "Invalid credentials"})
        if path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked['organization']}/{asked['name']}"
            self.server.repos.setdefault(repo, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(repo)
            return self.answer_json({"url": f"{self.server.url}/{repo}", "id": repo})
        if path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(content)["files"]
            mode = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
            return self.answer_json(
                {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in mode.items()]}
            )
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(content)["objects"]
            found = [
                {**o, "authenticated": True, "actions": {"upload": {"href": f"{self.server.url}/blob/{o['oid']}"}}}
                for o in asked
            ]
            return self.answer_json({"transfer": "basic", "objects": found})
        if target := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            repo = self.server.repos[target[1]]
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo[value["path"]] = b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repo[value["path"]] = self.server.blobs[value["oid"]]
            address = f"{self.server.url}/{target[1]}/commit/{commit(repo)}"
            return self.answer_json({"success": True, "commitOid": commit(repo), "commitUrl": address})
        return self.answer(404)


def commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted((name, oid(content)) for name, content in files.items())).encode()).hexdigest()


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
