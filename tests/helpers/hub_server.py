"""A small server on loopback with the part of the Hugging Face Hub's API by which exports are pushed and read."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

COMMIT = "0123456789" * 4


class HubState:
    """The repositories of a server: files by repository and name."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str] = set()
        """The tokens of the requests."""


class _Handler(BaseHTTPRequestHandler):
    state: HubState
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None: ...

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, state = urlparse(self.path).path, self.state
        state.tokens.add(self.headers.get("Authorization", ""))
        if path == "/api/repos/create":
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization"), given["name"])))
            state.files.setdefault(name, {})
            state.private[name] = given.get("visibility") == "private" or bool(given.get("private"))
            return self._json({"url": f"{state.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        repository = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    state.files[repository][value["path"]] = base64.b64decode(value["content"])
            return self._json({"commitUrl": f"{state.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})
        return self._json({"error": "not found"}, 404)

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        if path.startswith("/api/models/"):
            known = "/".join(path.split("/")[3:5]) in self.state.files
            return self._json({"id": path, "sha": COMMIT, "siblings": []} if known else {}, 200 if known else 404)
        _, user, name, _, _, file = [*path.split("/", 5), *[""] * 6][:6]
        data = self.state.files.get(f"{user}/{name}", {}).get(file)
        if data is None:
            kind = "EntryNotFound" if f"{user}/{name}" in self.state.files else "RepoNotFound"
            return self._answer(b"", 404, {"X-Error-Code": kind})
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._answer(data, 200, headers)

    do_HEAD = do_GET

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _answer(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def hub_server() -> Iterator[HubState]:
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.state = state = HubState(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
