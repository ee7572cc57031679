"""A Ray cluster of one node, started by `ray start --head` as a user would, in a home folder of its own."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.runs import ROOT

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")


@dataclass(frozen=True)
class Head:
    """A running head node."""

    address: str
    """of Ray, host:port"""
    dashboard: str
    """URL; also in `env`"""
    metrics: str
    """URL of the metrics for Prometheus"""
    home: Path
    env: dict[str, str]
    """of the cluster and its users"""

    def submit(self, *arguments: str, cwd: Path = Path("/")) -> subprocess.CompletedProcess[str]:
        """Run ``ray job submit`` with these arguments until the job has ended."""
        command = [RAY, "job", "submit", *arguments]
        return subprocess.run(command, cwd=cwd, env=self.env, capture_output=True, text=True, timeout=240, check=False)


@contextlib.contextmanager
def ray_head(folder: Path, *, token: bool, python_path: Path = ROOT) -> Iterator[Head]:
    """Start a head node with two CPUs and stop it at the end.

    Args:
        folder: empty; becomes the home folder.
        token: whether the cluster requires a token.
        python_path: where its Python finds the package.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "T2IDIST_"))}
    with tempfile.TemporaryDirectory(prefix="t2idist-head-", ignore_cleanup_errors=True) as temporary:
        env = {**clean, "HOME": str(folder), "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(python_path)}
        env |= {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": temporary, "RAY_metrics_report_interval_ms": "1000"}
        if token:
            env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        gcs, dashboard, metrics = free_port(), free_port(), free_port()
        start = [RAY, "start", "--head", "--num-cpus=2", "--disable-usage-stats", f"--temp-dir={temporary}"]
        start += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}"]
        start += [f"--{kind}={free_port()}" for kind in ("ray-client-server-port", "dashboard-agent-listen-port")]
        try:
            started = subprocess.run(start, cwd=folder, env=env, capture_output=True, text=True, check=False)
            assert started.returncode == 0, started.stdout + started.stderr
            env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
            address = _address(started.stdout + started.stderr, gcs)
            head = Head(address, env["RAY_API_SERVER_ADDRESS"], f"http://127.0.0.1:{metrics}/metrics", folder, env)
            _wait_for_dashboard(head)
            yield head
        finally:
            kill_processes_with(f"RAY_TMPDIR={temporary}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def kill_processes_with(variable: str) -> None:
    """Send SIGKILL to every process with this variable in its environment."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


def _address(output: str, port: int) -> str:
    """Return the address in the output of ``ray start``."""
    found = re.search(r"Local node IP: \D*([\d.]+)", re.sub(r"\x1b\[[\d;]*m", "", output))
    assert found is not None, output
    return f"{found[1]}:{port}"


def _wait_for_dashboard(head: Head) -> None:
    deadline = time.monotonic() + 90
    while subprocess.run([RAY, "job", "list"], env=head.env, capture_output=True, check=False).returncode != 0:
        assert time.monotonic() < deadline, "the head's dashboard does not respond"
        time.sleep(0.5)
