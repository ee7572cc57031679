"""An HTTP proxy in front of an object store that injects network faults into some requests.

Requests are forwarded unchanged, including the Host header, which is signed. One request per connection.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FaultPlan = Callable[[int, str, str], str | None]
"""Maps a request's number, method and target to its fault, or None."""

FAULTS = ("busy", "reset", "cut", "short", "stall")
"""503 SlowDown; connection reset in mid-body; body shorter than its length header; a consistent 206 with fewer bytes
than requested; two seconds without data in mid-body. Not drawn by `random_faults`: "refuse", a 403."""
STALL_SECONDS = 2.0
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_DENIED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


def random_faults(seed: int, share: float, faults: tuple[str, ...] = FAULTS, burst: int = 3) -> FaultPlan:
    """Plan faults for about `share` of the GET requests, 503 in bursts of `burst`; deterministic in the seed."""
    left = [0]

    def plan(number: int, method: str, target: str) -> str | None:
        generator = random.Random(f"{seed} {number}")
        if left[0] > 0:
            left[0] -= 1
            return "busy"
        if method != "GET" or generator.random() > share:
            return None
        fault = generator.choice(faults)
        left[0] = burst - 1 if fault == "busy" else 0
        return fault

    return plan


class FaultProxy:
    """A running proxy.

    Attributes:
        address: http://host:port.
        plan: the faults; may be replaced while the proxy runs.
        done: number of injections by fault.
        expired_keys: access keys whose requests are answered with ExpiredToken, as those of temporary credentials.
    """

    def __init__(self, upstream: str, plan: FaultPlan, host: str = "127.0.0.1") -> None:
        name, port = upstream.removeprefix("http://").split(":")
        self.plan = plan
        self.done: Counter[str] = Counter()
        self.requests = 0
        self.expired_keys: set[str] = set()
        self._upstream = (name, int(port))
        self._lock = threading.Lock()
        self._server = socket.create_server((host, 0), backlog=128)
        self.address = f"http://{host}:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head, rest = _until_blank_line(client)
            if not head:
                return
            method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
            with self._lock:
                key = re.search(rb"(?i)\r\nauthorization: [^\r]*Credential=([^/]+)/", head)
                expired = key is not None and key.group(1).decode() in self.expired_keys
                fault = "refuse" if expired else self.plan(self.requests, method, target)
                self.requests += 1
                self.done[fault or "none"] += 1
            if fault in ("busy", "refuse"):
                body, line = (_SLOW_DOWN, "503 Slow Down") if fault == "busy" else (_DENIED, "403 Forbidden")
                response = f"HTTP/1.1 {line}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
                client.sendall(f"{response}Connection: close\r\n\r\n".encode() + (b"" if method == "HEAD" else body))
                return
            with socket.create_connection(self._upstream) as store:
                store.sendall(
                    re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n" + rest
                )
                if method in ("PUT", "POST"):  # for GET, a thread that reads the client would block a reset
                    threading.Thread(target=_pump, args=(client, store), daemon=True).start()
                self._respond(store, client, fault if method == "GET" else None)
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_WR) if fault != "reset" else None

    def _respond(self, store: socket.socket, client: socket.socket, fault: str | None) -> None:
        head, body = _until_blank_line(store)
        match = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        length = int(match.group(1)) if match else 0
        if fault is None or length < 2:
            client.sendall(head + body)
            _pump(store, client)
            return
        half = length // 2
        if fault == "short":
            head = head.replace(match.group(0), b"\r\nContent-Length: %d" % half) if match else head
        while len(body) < length and (
            more := store.recv(1 << 18)
        ):  # read everything, so that the store does not see the fault
            body += more
        client.sendall(head + body[:half])
        if fault == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif fault == "stall":
            time.sleep(STALL_SECONDS)
            client.sendall(body[half:])


def _until_blank_line(source: socket.socket) -> tuple[bytes, bytes]:
    """Return a head with its blank line, and the bytes after it; empty if the connection was closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = source.recv(1 << 16)
        if not more:
            return b"", b""
        data += more
    at = data.index(b"\r\n\r\n") + 4
    return data[:at], data[at:]


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)


@contextmanager
def fault_proxy(upstream: str, plan: FaultPlan, host: str = "127.0.0.1") -> Iterator[FaultProxy]:
    """Run a proxy in front of the store at `upstream` (http://host:port)."""
    proxy = FaultProxy(upstream, plan, host)
    try:
        yield proxy
    finally:
        proxy.close()
