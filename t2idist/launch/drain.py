"""This machine is about to go: Ray is told, Ray Train tells the workers, and these save their state.

    python -m t2idist.launch.drain --seconds 30      now; returns when Ray's node here has ended, at the latest after that time
    python -m t2idist.launch.drain --watch aws       waits for the cloud's notice (aws, gcp), then does the same

For a pod's preStop hook, for spot machines, and for the signal that a batch system sends before it takes nodes back.
Ray's own settings (RAY_AUTH_MODE and the token) come from the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated import autoscaler_pb2
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
AWS_METADATA = "http://169.254.169.254"
GCP_METADATA = "http://metadata.google.internal"
GCP_NOTICE_SECONDS = 30.0
"""How long before its end Google's cloud tells a spot machine."""
_CALL_SECONDS = 5.0
_TOKEN_SECONDS = 300
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Raylet:
    """Ray's node on this machine. gcs: host:port of the cluster's head."""

    process_id: int
    node_id: str
    gcs: str


def find_raylet(processes: Path = Path("/proc")) -> Raylet:
    """Ray's node among this machine's processes, or this network namespace's. Raises ProcessLookupError for none."""
    own_network = os.stat("/proc/self/ns/net").st_ino
    for process in sorted(processes.glob("[0-9]*"), key=lambda p: int(p.name)):
        try:
            words = (process / "cmdline").read_text(errors="replace").split("\0")
            if not words[0].endswith("/raylet") or os.stat(process / "ns/net").st_ino != own_network:
                continue
        except OSError:
            continue
        flags = {flag.replace("-", "_"): value for flag, _, value in (word.partition("=") for word in words)}
        node, gcs = flags.get("__node_id"), flags.get("__gcs_address")
        if node and gcs:
            return Raylet(int(process.name), node, gcs)
    raise ProcessLookupError("no Ray node runs on this machine")


def drain(raylet: Raylet, seconds: float, why: str) -> None:
    """Tell Ray that the machine goes in so many seconds. Raises RuntimeError where it will not hear of it."""
    deadline_ms = int(1000 * (time.time() + seconds))
    host, _, port = raylet.gcs.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CALL_SECONDS):
            pass  # Ray's client would wait for a head that is gone longer than this machine has
        accepted, refusal = GcsClient(address=raylet.gcs).drain_node(
            raylet.node_id,
            autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,  # type: ignore[attr-defined]
            why,
            deadline_ms,
            timeout=_CALL_SECONDS,
        )
    except (OSError, RayError) as error:
        raise RuntimeError(f"Ray's head at {raylet.gcs} was not told: {error}") from None
    if not accepted:
        raise RuntimeError(f"Ray's head at {raylet.gcs} refuses: {refusal}")


def wait(raylet: Raylet, seconds: float) -> None:
    """Until Ray's node has ended, which it does when nothing runs on it any more, but no longer than that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and Path(f"/proc/{raylet.process_id}").exists():
        time.sleep(0.2)


# ------------------------------------------------------------ notices of clouds
def aws_notice(address: str = AWS_METADATA) -> float | None:
    """Seconds until this spot instance is taken back; None where nobody said so."""
    token = _answer(
        f"{address}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": f"{_TOKEN_SECONDS}"}, method="PUT"
    )
    if token is None:
        return None
    said = _answer(f"{address}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    if said is None:
        return None
    when = datetime.fromisoformat(json.loads(said)["time"].replace("Z", "+00:00"))
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def gcp_notice(address: str = GCP_METADATA) -> float | None:
    """Seconds until this spot machine is taken back; None where nobody said so."""
    said = _answer(f"{address}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return GCP_NOTICE_SECONDS if said is not None and said.strip() == "TRUE" else None


CLOUDS: Mapping[str, Callable[[], float | None]] = {"aws": aws_notice, "gcp": gcp_notice}


def watch(notice: Callable[[], float | None], look_seconds: float = LOOK_SECONDS) -> float:
    """Wait for a cloud's notice; gives the seconds that are left."""
    while True:
        try:
            seconds = notice()
        except (OSError, ValueError, KeyError) as error:  # a metadata server that is late says nothing of our end
            logger.warning("the metadata server was not understood: %r", error)
            seconds = None
        if seconds is not None:
            return seconds
        time.sleep(look_seconds)


def _answer(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """None where the server says that there is no such thing."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with _NO_PROXY.open(request, timeout=_CALL_SECONDS) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


# ------------------------------------------------------------ the command
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m t2idist.launch.drain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    when = made.add_mutually_exclusive_group(required=True)
    when.add_argument("--seconds", type=float, metavar="N", help="the machine goes in so many seconds")
    when.add_argument("--watch", choices=sorted(CLOUDS), help="whose notice to wait for")
    made.add_argument("--no-wait", action="store_true", help="return as soon as Ray was told")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Gives the exit status: 0 Ray was told, 1 it was not, 2 bad input."""
    arguments = parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if arguments.seconds is not None and not 0 < arguments.seconds <= 3600:
        print(f"error: --seconds {arguments.seconds:g}; allowed are more than 0, up to 3600", file=sys.stderr)
        return 2
    seconds, why = arguments.seconds, "this machine was told to end"
    if arguments.watch is not None:
        seconds, why = watch(CLOUDS[arguments.watch]), f"{arguments.watch} takes this machine back"
    try:
        raylet = find_raylet()
        drain(raylet, seconds, why)
    except (ProcessLookupError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    logger.info("%s in %.0f s; Ray %s knows", why, seconds, ray.__version__)
    if not arguments.no_wait:
        with contextlib.suppress(KeyboardInterrupt):
            wait(raylet, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
