"""Serve from this process, without Ray."""

from __future__ import annotations

import errno
import socket

import uvicorn
from starlette.types import ASGIApp

BACKLOG = 2048
NO_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""This machine does not have the address."""
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
    except (OSError, UnicodeError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or "not a valid name"
        of_host = not isinstance(error, OSError) or isinstance(error, socket.gaierror) or error.errno in NO_ADDRESS
        remedy = "--host, an address of this machine" if of_host else "--port (0: any that is free)"
        raise ValueError(f"--host {host} --port {port}: {reason}; give another {remedy}") from None
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
