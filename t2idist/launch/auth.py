"""Check that a Ray cluster may be joined: whoever reaches an unauthenticated one can run code with its jobs' rights."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

TOKEN_FILE = Path(".ray") / "auth_token"
"""Ray's default token file, relative to the home folder."""


def cluster_address(address: str, environment: Mapping[str, str]) -> str:
    """Return the address of the cluster that a run with this `cluster.address` joins; "" if it starts Ray itself."""
    if address in ("", "auto"):
        address = environment.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def require_token(address: str, environment: Mapping[str, str], home: Path) -> None:
    """Require Ray's token authentication for a cluster that is not on this machine.

    Args:
        address: as returned by `cluster_address`.

    Raises:
        ValueError: RAY_AUTH_MODE is not "token", or there is no token.
    """
    if not address or is_loopback(address):
        return
    mode = environment.get("RAY_AUTH_MODE", "")
    if mode.lower() != "token":
        raise ValueError(
            f"cluster.address: {address} is not on this machine and RAY_AUTH_MODE is {mode or 'not set'}: anybody who "
            "reaches an unauthenticated cluster can run code on it; start it with RAY_AUTH_MODE=token and set that "
            "here too, with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or pass --insecure-cluster"
        )
    if environment.get("RAY_AUTH_TOKEN", "").strip():
        return
    file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / TOKEN_FILE)
    try:
        token = file.read_text().strip()
    except OSError as error:
        token = ""
        reason = error.strerror or type(error).__name__
    else:
        reason = "is empty"
    if not token:
        raise ValueError(
            f"RAY_AUTH_MODE=token without a token: RAY_AUTH_TOKEN is not set, and {file}: {reason}; set RAY_AUTH_TOKEN "
            "to the cluster's token or RAY_AUTH_TOKEN_PATH to its file"
        )


def is_loopback(address: str) -> bool:
    """Return whether ``host:port`` or ``ray://host:port`` is a loopback address."""
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    except ValueError:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
