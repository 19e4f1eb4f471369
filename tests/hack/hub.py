"""A tiny stand-in for the Hugging Face hub on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors",)


class Hub:
    """Serves one model repository.

    Attributes:
        files: contents by name.
        ranges: first byte of every download, by name.
        broken: names whose contents arrive damaged.
        stall_after: bytes after which downloads stop without an end; None lets them finish.
        revisions: branches and tags that there are.
        refusal: status and error code with which everything is refused; None answers.
        tokens: what clients sent to prove who they are.
    """

    def __init__(self, model_id: str, files: dict[str, bytes]) -> None:
        self.model_id = model_id
        self.files = files
        self.ranges: dict[str, list[int]] = {}
        self.broken: set[str] = set()
        self.stall_after: int | None = None
        self.revisions = {"main", COMMIT}
        self.refusal: tuple[int, str] | None = None
        self.tokens: set[str | None] = set()
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let this process download from here into `cache`; it reads the environment only once."""
        constants = "huggingface_hub.constants"
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.ENDPOINT", self.url)
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)

    def info(self) -> dict:
        return {
            "id": self.model_id,
            "modelId": self.model_id,
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [
                {"rfilename": name, "size": len(data), "blobId": git_hash(data)} | lfs(name, data)
                for name, data in self.files.items()
            ],
        }

    def tree(self) -> list[dict]:
        files = []
        for name, data in self.files.items():
            large = lfs(name, data).get("lfs")
            files.append(
                {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
                | (
                    {"lfs": {"oid": large["sha256"], "size": len(data), "pointerSize": 134}}
                    if large
                    else {}
                )
            )
        return files


def lfs(name: str, data: bytes) -> dict:
    if not name.endswith(LARGE):
        return {}
    sha256 = hashlib.sha256(data).hexdigest()
    return {"lfs": {"sha256": sha256, "size": len(data), "pointerSize": 134}}


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.hub.refusal is not None:
            status, code = self.hub.refusal
            return self.send(b"{}", status, {"X-Error-Code": code})
        if path.startswith(f"/api/models/{self.hub.model_id}"):
            return self.send_description(path.removeprefix(f"/api/models/{self.hub.model_id}"))
        return self.send_file(path)

    def send_description(self, path: str) -> None:
        kind, _, revision = path.strip("/").partition("/")
        if revision and revision not in self.hub.revisions:
            return self.send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        about = self.hub.tree() if kind == "tree" else self.hub.info()
        return self.send(json.dumps(about).encode())

    do_HEAD = do_GET

    def send_file(self, path: str) -> None:
        found = re.fullmatch(rf"/{self.hub.model_id}/resolve/\w+/(.+)", path)
        if not found or found[1] not in self.hub.files:
            return self.send(b"{}", status=404)
        data = self.hub.files[found[1]]
        etag = lfs(found[1], data).get("lfs", {}).get("sha256") or git_hash(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        if self.command == "GET":
            self.hub.ranges.setdefault(found[1], []).append(start)
            if found[1] in self.hub.broken:
                data = data[:-1] + bytes([data[-1] ^ 1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.send(data[start:], 206 if start else 200, headers)

    def send(self, body: bytes, status: int = 200, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.stall_after is not None and len(body) > self.hub.stall_after:
            self.wfile.write(body[: self.hub.stall_after])
            self.wfile.flush()
            self.hub.released.wait(60)
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
