"""The hub's calls that pushing and pulling an adapter make, over HTTP on 127.0.0.1: what `huggingface_hub` sends and reads is real."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class FakeHub:
    """Repositories in memory. repos: name -> {revision: files}; a commit is a revision too. Files of more than `large` bytes are LFS's."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    heads: dict[tuple[str, str], str] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    large: int = 4096
    objects: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, set[str]] = field(default_factory=dict)
    url: str = ""
    # faults
    cut: int | None = None
    busy: int = 0
    lies: dict[str, bytes] = field(default_factory=dict)
    claims: dict[str, dict[str, Any]] = field(default_factory=dict)
    loop: bool = False
    ranges: bool = True

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit on a branch; returns its id."""
        commit = hashlib.sha1(repr((repo, branch, sorted(files.items()))).encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        self.heads[repo, branch] = commit
        return commit

    def commit_of(self, repo: str, revision: str) -> str | None:
        found = self.heads.get((repo, revision), revision)
        return found if found in self.repos.get(repo, {}) else None


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._route("GET", b"")

    def do_HEAD(self) -> None:
        self._route("HEAD", b"")

    def do_POST(self) -> None:
        self._route("POST", self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self) -> None:
        self._route("PUT", self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _route(self, method: str, body: bytes) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.log.append(f"{method} {path}")
        hub.tokens.setdefault("lfs" if path.startswith("/lfs/") else "hub", set()).add(self.headers.get("Authorization", ""))
        if hub.busy:
            hub.busy -= 1
            self._answer(503, {"error": "busy"}, {"Retry-After": "0"})
            return
        for pattern, handle in ROUTES:
            if match := re.fullmatch(pattern, f"{method} {path}"):
                handle(self, hub, body, *match.groups())
                return
        self._answer(404, {"error": f"no such route: {method} {path}"})

    def _answer(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- the calls ----

    def info(self, hub: FakeHub, body: bytes, repo: str, _: Any = None, revision: str | None = None) -> None:
        if repo not in hub.repos:
            self._answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
            return
        commit = hub.commit_of(repo, revision or "main")
        if commit is None and hub.repos[repo]:
            self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = []
        for name, data in hub.repos[repo].get(commit or "", {}).items():
            said: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_id(data)}
            if len(data) > hub.large:
                said["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(said | hub.claims.get(name, {}))
        self._answer(200, {"id": repo, "sha": commit or "0" * 40, "siblings": siblings, "private": repo in hub.private})

    def resolve(self, hub: FakeHub, body: bytes, repo: str, revision: str, name: str) -> None:
        if hub.loop:
            self._answer(302, {}, {"Location": self.path})
            return
        commit = hub.commit_of(repo, revision)
        data = hub.lies.get(name, hub.repos.get(repo, {}).get(commit or "", {}).get(name))
        if data is None:
            self._answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
            return
        start = int(re.fullmatch(r"bytes=(\d+)-\d+", self.headers["Range"])[1]) if hub.ranges and "Range" in self.headers else 0  # type: ignore[index]
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit or "")
        self.send_header("ETag", f'"{git_id(data)}"')
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        piece = data[start:]
        if hub.cut is not None and len(piece) > hub.cut:
            piece, hub.cut, self.close_connection = piece[: hub.cut], None, True
        self.wfile.write(piece)
        hub.sent[name] = hub.sent.get(name, 0) + len(piece)

    def create(self, hub: FakeHub, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if asked.get("private") or asked.get("visibility") == "private":
            hub.private.add(repo)
        hub.add(repo, {})
        self._answer(200, {"url": f"{hub.url}/{repo}", "name": repo})

    def branch(self, hub: FakeHub, body: bytes, repo: str, branch: str) -> None:
        if (repo, branch) in hub.heads:
            self._answer(409, {"error": "there is one"})
            return
        hub.heads[repo, branch] = hub.heads[repo, "main"]
        self._answer(201, {})

    def validate(self, hub: FakeHub, body: bytes) -> None:
        good = json.loads(body)["content"].startswith("---\n")
        self._answer(200 if good else 400, {"errors": [] if good else [{"message": "no front matter"}], "warnings": []})

    def preupload(self, hub: FakeHub, body: bytes, repo: str, revision: str) -> None:
        files = json.loads(body)["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["size"] > hub.large else "regular", "shouldIgnore": False} for f in files]
        self._answer(200, {"files": modes})

    def batch(self, hub: FakeHub, body: bytes, repo: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}
            objects.append(wanted | ({} if wanted["oid"] in hub.objects else {"actions": upload}))
        self._answer(200, {"transfer": "basic", "objects": objects})

    def put(self, hub: FakeHub, body: bytes, oid: str) -> None:
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            hub.objects[oid] = body
        self._answer(200 if good else 400, {})

    def commit(self, hub: FakeHub, body: bytes, repo: str, revision: str) -> None:
        files = dict(hub.repos[repo][hub.heads[repo, revision]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = hub.add(repo, files, revision)
        self._answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True})


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (rf"GET /api/models/{REPO}(/revision/(.+))?", Handler.info),
    (rf"GET /{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
    (r"POST /api/repos/create", Handler.create),
    (rf"POST /api/models/{REPO}/branch/(.+)", Handler.branch),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{REPO}/preupload/(.+)", Handler.preupload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/([0-9a-f]{64})", Handler.put),
    (rf"POST /api/models/{REPO}/commit/(.+)", Handler.commit),
]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: FakeHub

    def handle_error(self, *_: object) -> None:
        """A client that goes away is what tests are about."""


@contextlib.contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub to which `huggingface_hub` speaks as long as the block lasts."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    server = Server(("127.0.0.1", 0), Handler)
    hub = server.hub = FakeHub(url=f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files by LFS over HTTP: the chunk store is no server to imitate
    try:
        yield hub
    finally:
        close_session()
        server.shutdown()
        server.server_close()
