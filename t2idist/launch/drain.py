"""Drain this node before its machine is shut down: Ray Train notifies the workers, which save their state.

    t2idist drain --seconds 30     drain now; return when Ray's node here has ended, at the latest after 30 s
    t2idist drain --watch aws      wait for the cloud's notice (aws, gcp), then drain

For a pod's preStop hook, for spot machines, and for the signal that a batch system sends before it takes nodes back.
Ray's own settings (RAY_AUTH_MODE and the token) come from the environment.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import ray
from ray.exceptions import RayError

from t2idist.config.arguments import command_parser
from t2idist.launch.ray_internals import GcsClient, autoscaler_pb2
from t2idist.observability.command import command

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
AWS_METADATA = "http://169.254.169.254"
GCP_METADATA = "http://metadata.google.internal"
GCP_NOTICE_SECONDS = 30.0
"""How long before the shutdown Google Cloud notifies a spot machine."""
_CALL_SECONDS = 5.0
_TOKEN_SECONDS = 300
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Raylet:
    """Ray's node on this machine."""

    process_id: int
    node_id: str
    gcs: str
    """host:port of the cluster's head"""


def find_raylet(processes: Path = Path("/proc")) -> Raylet:
    """Find Ray's node among the processes of this network namespace; raises ProcessLookupError if there is none."""
    own_network = os.stat("/proc/self/ns/net").st_ino
    for process in sorted(processes.glob("[0-9]*"), key=lambda p: int(p.name)):
        try:
            arguments = (process / "cmdline").read_text(errors="replace").split("\0")
            if not arguments[0].endswith("/raylet") or os.stat(process / "ns/net").st_ino != own_network:
                continue
        except OSError:
            continue
        pairs = (argument.partition("=") for argument in arguments)
        flags = {flag.replace("-", "_"): value for flag, _, value in pairs}
        node, gcs = flags.get("__node_id"), flags.get("__gcs_address")
        if node and gcs:
            return Raylet(int(process.name), node, gcs)
    raise ProcessLookupError("no Ray node runs on this machine")


def drain(raylet: Raylet, seconds: float, reason: str) -> None:
    """Notify Ray that the node ends in `seconds`; raises RuntimeError if the head does not respond or refuses."""
    deadline_ms = int(1000 * (time.time() + seconds))
    host, _, port = raylet.gcs.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CALL_SECONDS):
            pass  # Ray's client would wait for a lost head longer than this machine exists
        accepted, refusal = GcsClient(address=raylet.gcs).drain_node(
            raylet.node_id,
            autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
            reason,
            deadline_ms,
            timeout=_CALL_SECONDS,
        )
    except (OSError, RayError) as error:
        raise RuntimeError(f"Ray's head at {raylet.gcs} could not be notified: {error}") from None
    if not accepted:
        raise RuntimeError(f"Ray's head at {raylet.gcs} refuses: {refusal}")


def wait(raylet: Raylet, seconds: float) -> None:
    """Wait until Ray's node has ended, which it does when nothing runs on it any more, at most `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and Path(f"/proc/{raylet.process_id}").exists():
        time.sleep(0.2)


# ------------------------------------------------------------ notices of clouds
def aws_notice(address: str = AWS_METADATA) -> float | None:
    """Return the seconds until this spot instance is reclaimed; None without a notice."""
    token = _get(
        f"{address}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": f"{_TOKEN_SECONDS}"}, method="PUT"
    )
    if token is None:
        return None
    action = _get(f"{address}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    if action is None:
        return None
    shutdown = datetime.fromisoformat(json.loads(action)["time"].replace("Z", "+00:00"))
    return max(0.0, (shutdown - datetime.now(UTC)).total_seconds())


def gcp_notice(address: str = GCP_METADATA) -> float | None:
    """Return the seconds until this spot machine is reclaimed; None without a notice."""
    preempted = _get(f"{address}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return GCP_NOTICE_SECONDS if preempted is not None and preempted.strip() == "TRUE" else None


CLOUDS: Mapping[str, Callable[[], float | None]] = {"aws": aws_notice, "gcp": gcp_notice}


def watch(notice: Callable[[], float | None], poll_seconds: float = POLL_SECONDS) -> float:
    """Wait for a cloud's notice; returns the seconds that are left."""
    while True:
        try:
            seconds = notice()
        except (OSError, ValueError, KeyError) as error:  # a slow metadata server says nothing about a shutdown
            logger.warning("no valid response from the metadata server: %r", error)
            seconds = None
        if seconds is not None:
            return seconds
        time.sleep(poll_seconds)


def _get(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """Return the body of the response; None for status 404."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with _NO_PROXY.open(request, timeout=_CALL_SECONDS) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


# ------------------------------------------------------------ the command
@command("error")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 Ray was notified, 1 it was not, 2 bad input."""
    parser = command_parser("drain", "Drain this node before its machine is shut down.", "t2idist drain --seconds 30")
    when = parser.add_mutually_exclusive_group(required=True)
    when.add_argument("--seconds", type=float, metavar="N", help="the machine is shut down in N seconds")
    when.add_argument("--watch", choices=sorted(CLOUDS), help="wait for the notice of this cloud")
    parser.add_argument("--no-wait", action="store_true", help="return as soon as Ray is notified")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if options.seconds is not None and not 0 < options.seconds <= 3600:
        raise ValueError(f"--seconds {options.seconds:g}; allowed are more than 0, up to 3600")
    seconds, reason = options.seconds, "this machine is being shut down"
    if options.watch is not None:
        seconds, reason = watch(CLOUDS[options.watch]), f"{options.watch} reclaims this machine"
    raylet = find_raylet()
    drain(raylet, seconds, reason)
    logger.info("%s in %.0f s; Ray %s was notified", reason, seconds, ray.__version__)
    if not options.no_wait:
        with contextlib.suppress(KeyboardInterrupt):
            wait(raylet, seconds)
    return 0
