"""``ray job submit`` of the main command to a cluster that was started by hand, as a user would."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_run import ROOT, check_finished, recipe

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def end_processes_with(variable: str) -> None:
    """SIGKILL for every process that has this in its environment."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """A head node on this machine, with a token: its dashboard's address, and the environment of its users."""
    with tempfile.TemporaryDirectory(prefix="t2idist-head-", ignore_cleanup_errors=True) as temporary:
        env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "OMP_NUM_THREADS": "1"}
        env["RAY_TMPDIR"] = temporary
        dashboard = free_port()
        start = [RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", f"--temp-dir={temporary}"]
        kinds = ("port", "ray-client-server-port", "dashboard-agent-listen-port")
        ports = [f"--dashboard-port={dashboard}", *(f"--{kind}={free_port()}" for kind in kinds)]
        node = subprocess.Popen([*start, *ports], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{dashboard}", env
        finally:
            end_processes_with(f"RAY_TMPDIR={temporary}")  # `ray start --block` itself takes half a minute for it
            node.wait(60)


@pytest.mark.whole
def test_a_submitted_job_trains_on_the_cluster(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, env = head
    file = recipe(tmp_path, cluster={"workers": [1, 2], "cpus_per_worker": 1})
    submit = [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"]
    ask = [RAY, "job", "list", "--address", address]
    deadline = time.monotonic() + 90
    while subprocess.run(ask, env=env, capture_output=True, check=False).returncode != 0:
        assert time.monotonic() < deadline, "the head's dashboard does not answer"
        time.sleep(0.5)
    command = [*submit, sys.executable, "-m", "t2idist.run", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "workers 2" in done.stdout
    check_finished(tmp_path)
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
