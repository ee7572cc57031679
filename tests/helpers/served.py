"""Start servers of ``t2idist serve`` and talk to them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from t2idist.serve.api import create_app
from t2idist.serve.drawer import Drawer, ServeConfig
from t2idist.serve.gate import GateConfig
from t2idist.serve.local import bind
from tests.helpers.runs import ROOT

START_SECONDS = 120
TIMEOUT = 60


@dataclass(frozen=True)
class Answer:
    """What a server answers."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])

    @property
    def files(self) -> list[list[bytes]]:
        """The PNG files of each image of /draw."""
        assert self.status == 200, self.body
        return [[base64.b64decode(png) for png in image["pngs"]] for image in self.json["images"]]


@dataclass
class Client:
    """Talks to the server at a URL."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    drawer: Drawer | None = None
    """Of a server in this process."""

    def ask(self, path: str, body: Any = None, method: str = "", **headers: str) -> Answer:
        """Send a request; a body that is no bytes is sent as JSON. Underscores in names of headers are dashes."""
        sent = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        request = urllib.request.Request(self.url + path, body, sent, method=method or None)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read())

    def draw(self, **body: Any) -> Answer:
        return self.ask("/draw", body)

    def leave(self, **body: Any) -> None:
        """Send a request to /draw and close the connection without waiting for the answer."""
        host, port = self.url.removeprefix("http://").split(":")
        content = json.dumps(body).encode()
        head = f"POST /draw HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            time.sleep(0.02)


@contextlib.contextmanager
def serving(
    export: str, *, host: str = "127.0.0.1", token_sha256: str | None = None, **config: Any
) -> Iterator[Client]:
    """Serve an export in a thread of this process."""
    settings = ServeConfig(export, **config)
    drawer = Drawer(settings)
    app = create_app(drawer, GateConfig(host, token_sha256, settings.upload_bytes))
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Client(f"http://127.0.0.1:{sock.getsockname()[1]}", drawer=drawer)
    finally:
        server.should_exit = True
        thread.join(20)


@contextlib.contextmanager
def command(home: Path, *arguments: str, **environment: str) -> Iterator[tuple[Client, subprocess.Popen[str]]]:
    """Run ``t2idist serve`` as a program, on a free port; ends it by SIGTERM."""
    variables = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    words = [sys.executable, "-m", "t2idist.cli", "serve", "--port", "0", *arguments]
    log = home / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=variables, stdout=file, stderr=file, text=True)
    try:
        yield Client(_address(process, log)), process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _address(process: subprocess.Popen[str], log: Path) -> str:
    """Wait until a server has said where it is."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if found := re.search(r"^serving .* at (http://\S+)", log.read_text(), re.M):
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"not ready after {START_SECONDS} s: {log.read_text()}")
