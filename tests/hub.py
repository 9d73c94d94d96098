"""A hub on this machine: the clients of the real one ask it for models and data sets, by HTTP.

    with Hub({"datasets/owner/name": {"train.jsonl": b"..."}}) as hub:
        start(code, folder, **hub.environment(folder))

It answers what `datasets`, `transformers` and the hub's client ask: which files a repository has,
and the files. Where a process asks is decided when it starts, so this is for processes of a test.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"
KINDS = "revision|tree|paths-info"
API = re.compile(rf"/api/(models|datasets)/([^/]+/[^/]+)(?:/({KINDS})/[^/]+(?:/.*)?)?")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class Hub(ThreadingHTTPServer):
    """Serves {`models/owner/name` or `datasets/owner/name`: {path: content}}.

    `status`, where given, is all that it answers, as where the real one is overloaded. `asked` are
    the paths that it was asked for.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories = repositories
        self.status: int | None = None
        self.asked: list[str] = []

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables of a process that is to ask this hub, with its caches in `folder`."""
        online = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "0")
        return online | {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(folder / "hub"),
            "no_proxy": "127.0.0.1",
        }


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.server.asked.append(path)
        if self.server.status:
            self._send(self.server.status)
        elif api := API.fullmatch(path):
            self._describe(*api.groups(), body)
        elif file := FILE.fullmatch(path):
            self._send_file(f"{file[1] or 'models'}/{file[2]}", file[3])
        else:
            self._send(404)

    do_HEAD = do_POST = do_GET

    def _describe(self, kind: str, name: str, what: str | None, body: str) -> None:
        files = self.server.repositories.get(f"{kind}/{name}")
        if files is None:
            self._send(404, headers={"X-Error-Code": "RepoNotFound"})
            return
        answer: object = [
            {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}
            for path, content in files.items()
            if what != "paths-info" or path in _paths(body)
        ]
        if what in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            answer = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": []}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, repository: str, path: str) -> None:
        content = self.server.repositories.get(repository, {}).get(path)
        headers = {"X-Repo-Commit": COMMIT}
        if content is None:
            self._send(404, headers=headers | {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(200, content, headers | {"ETag": f'"{_digest(content)}"'})

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _paths(body: str) -> list[str]:
    return json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
