"""Whether a Ray cluster may be joined: who reaches an open one runs any code on it, with all that its jobs may do."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

TOKEN_FILE = Path(".ray") / "auth_token"
"""Where Ray looks for the token below the home folder."""


def cluster_address(address: str, environment: Mapping[str, str]) -> str:
    """The address of the cluster that a run with this `cluster.address` joins; "" where it starts Ray itself."""
    if address in ("", "auto"):
        address = environment.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def require_token(address: str, environment: Mapping[str, str], home: Path) -> None:
    """Raises ValueError for a cluster off this machine that is joined without Ray's token authentication.

    address: as `cluster_address` gives it.
    """
    if not address or is_loopback(address):
        return
    mode = environment.get("RAY_AUTH_MODE", "")
    if mode.lower() != "token":
        raise ValueError(
            f"cluster.address: {address} is off this machine and RAY_AUTH_MODE is {mode or 'not set'}: whoever reaches "
            "an open cluster runs code on it; start it with RAY_AUTH_MODE=token and set that here too, with "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or give --insecure-cluster"
        )
    if environment.get("RAY_AUTH_TOKEN", "").strip():
        return
    file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / TOKEN_FILE)
    try:
        token = file.read_text().strip()
    except OSError as error:
        token = ""
        fault = error.strerror or type(error).__name__
    else:
        fault = "is empty"
    if not token:
        raise ValueError(
            f"RAY_AUTH_MODE=token without a token: RAY_AUTH_TOKEN is not set, and {file}: {fault}; set RAY_AUTH_TOKEN "
            "or RAY_AUTH_TOKEN_PATH to the cluster's"
        )


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` or ``ray://host:port`` names this machine alone."""
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    except ValueError:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
