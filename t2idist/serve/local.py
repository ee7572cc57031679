"""Serve from this process, without Ray."""

from __future__ import annotations

import socket

import uvicorn
from starlette.types import ASGIApp

BACKLOG = 2048
SECONDS_TO_FINISH = 10
"""How long a server that is stopped goes on with the requests that it has."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address. Raises ValueError if it is in use, or none of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host.strip("[]"), port))
        sock.listen(BACKLOG)  # without this, a second server could bind to the same address
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"--host {host} --port {port}: {reason}; give another --port (0: any that is free)") from None
    return sock


def serve(app: ASGIApp, sock: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_FINISH,
    )
    uvicorn.Server(config).run(sockets=[sock])
