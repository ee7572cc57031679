"""``ray job submit`` of a run to a cluster started by hand, as a user would do it."""

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
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2idist.observability import prometheus
from tests.helpers.runs import ROOT, check_finished, write_recipe

RAY = str(Path(sys.executable).parent / "ray")


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


@pytest.fixture
def head() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Start a head node with a token; yields its dashboard's address, its metrics' address, and users' environment."""
    with tempfile.TemporaryDirectory(prefix="t2idist-head-", ignore_cleanup_errors=True) as temporary:
        env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
        env |= {"RAY_TMPDIR": temporary, "RAY_metrics_report_interval_ms": "1000"}
        metrics = free_port()
        dashboard = free_port()
        start = [RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", f"--temp-dir={temporary}"]
        kinds = ("port", "ray-client-server-port", "dashboard-agent-listen-port")
        ports = [f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}"]
        ports += [*(f"--{kind}={free_port()}" for kind in kinds)]
        node = subprocess.Popen([*start, *ports], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics", env
        finally:
            kill_processes_with(f"RAY_TMPDIR={temporary}")  # `ray start --block` takes half a minute to end
            node.wait(60)


class Scraper(threading.Thread):
    """Collects the names of our metrics that Prometheus would scrape, until `end` is called."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.names: set[str] = set()
        self._address, self._end = address, threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.5):
            with contextlib.suppress(OSError), urllib.request.urlopen(self._address, timeout=5) as response:
                text = response.read().decode()
                self.names |= set(re.findall(rf'^{prometheus.PREFIX}(t2idist_\w+){{.*run="tiny"', text, re.MULTILINE))

    def end(self) -> None:
        self._end.set()
        self.join()


@pytest.mark.whole
def test_a_submitted_job_trains_on_the_cluster(head: tuple[str, str, dict[str, str]], tmp_path: Path) -> None:
    address, metrics, env = head
    file = write_recipe(tmp_path, cluster={"workers": [1, 2], "cpus_per_worker": 1})
    submit = [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"]
    list_jobs = [RAY, "job", "list", "--address", address]
    deadline = time.monotonic() + 90
    while subprocess.run(list_jobs, env=env, capture_output=True, check=False).returncode != 0:
        assert time.monotonic() < deadline, "the head's dashboard does not respond"
        time.sleep(0.5)
    command = [*submit, sys.executable, "-m", "t2idist.run", str(file)]
    scraper = Scraper(metrics)
    scraper.start()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    scraper.end()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "workers 2" in done.stdout
    check_finished(tmp_path)
    assert scraper.names == prometheus.METRICS.keys() - {"t2idist_device_memory_bytes"}  # no accelerator here
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        assert env["RAY_AUTH_TOKEN"].encode() not in file.read_bytes(), file
    assert env["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr
    wrong = subprocess.run(
        [*submit, sys.executable, "-m", "t2idist.run", "atngan"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert wrong.returncode != 0
    assert "did you mean 'attngan'" in wrong.stdout + wrong.stderr
