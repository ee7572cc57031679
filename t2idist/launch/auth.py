"""Check how a Ray cluster may be joined: whoever reaches an unauthenticated one can run code with its jobs' rights."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from t2idist.launch import interfaces

TOKEN_FILE = Path(".ray") / "auth_token"
"""Ray's default token file, relative to the home folder."""


def cluster_address(address: str, environment: Mapping[str, str]) -> str:
    """Return the address of the cluster that a run with this `cluster.address` joins; "" if it starts Ray itself."""
    if address in ("", "auto"):
        address = environment.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def joined_address() -> str:
    """Return the address of the cluster that this process is connected to, as in a notebook; "" if it is to none."""
    ray = sys.modules.get("ray")  # not imported: not connected
    if ray is None or not ray.is_initialized():
        return ""
    return str(ray.get_runtime_context().gcs_address)


def check_cluster(address: str, environment: Mapping[str, str], home: Path, required: bool) -> str:
    """Check that a run may join a cluster.

    Args:
        address: as returned by `cluster_address`.
        required: `cluster.require_token`.

    Returns:
        A warning if the cluster is joined without authentication, else "".

    Raises:
        ValueError: a token is required and RAY_AUTH_MODE is not "token", or it is and there is no token.
    """
    if not address:
        return ""
    mode = environment.get("RAY_AUTH_MODE", "")
    if mode.lower() == "token":
        _read_token(environment, home)
        return ""
    where = f"{address} (this machine)" if is_this_machine(address) else address
    mode = mode or "not set"
    if required:
        raise ValueError(
            f"cluster.require_token: true, but RAY_AUTH_MODE is {mode} for the Ray cluster at {where}; start it with "
            "RAY_AUTH_MODE=token. Set that here too, with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; or set "
            "cluster.require_token=false"
        )
    return (
        f"the Ray cluster at {where} is joined without a token (RAY_AUTH_MODE is {mode}); start it with "
        "RAY_AUTH_MODE=token. Anybody who reaches an open cluster can run code on it"
    )


def has_token(environment: Mapping[str, str], home: Path) -> bool:
    """Return whether the user has given Ray a token: in a variable, in a file or in Ray's default file."""
    try:
        _read_token(environment, home)
    except ValueError:
        return False
    return True


def _read_token(environment: Mapping[str, str], home: Path) -> None:
    """Look for a token where Ray does; raises ValueError if there is none."""
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
            f"RAY_AUTH_MODE=token, but RAY_AUTH_TOKEN is not set, and {file}: {reason}; set RAY_AUTH_TOKEN to the "
            "cluster's token, or RAY_AUTH_TOKEN_PATH to its file"
        )


def is_this_machine(address: str) -> bool:
    """Return whether ``host:port`` or ``ray://host:port`` is an address of an interface of this machine."""
    if address == "auto":  # in a job of a cluster that was itself started with RAY_ADDRESS
        return True
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    except ValueError:
        return False
    return host in ("localhost", socket.gethostname().lower()) or interfaces.interface_of(host) is not None
