"""A cluster of several hosts for one test or tool: started, with a store behind a proxy, and taken down at the end."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from t2idist import storage
from t2idist.engine.metrics import PROGRESS
from tests.helpers.fault_proxy import Proxy, fault_proxy
from tests.helpers.object_store import seaweedfs
from tools.chaos.hosts import Cluster, check_machine, environment, free_subnet

RUNS = "s3://bucket/runs"


@contextmanager
def cluster(
    hosts: int = 3, *, dead_after_seconds: float = 10.0, cpus_per_host: int = 1, keep: Path | None = None
) -> Iterator[tuple[Cluster, Proxy]]:
    """A running cluster, and the proxy that stands between it and the store (its plan may be replaced).

    dead_after_seconds: a host that is silent for so long is given up by Ray. keep: folder for the nodes' logs, which
    stays. In the block this process's own environment names the store. Raises `Missing`.
    """
    check_machine()
    folder = Path(tempfile.mkdtemp(prefix="t2h-", dir="/tmp"))  # short: sockets lie in it
    each_ms = int(1000 * dead_after_seconds / 3)
    env = environment(secrets.token_hex(32), health_period_ms=each_ms // 3, health_timeout_ms=each_ms - each_ms // 3)
    made = Cluster(str(os.getpid()), hosts, folder, free_subnet(), env, cpus_per_host)
    try:
        made.make_bridge()
        with seaweedfs(made.gate) as reach, fault_proxy(reach["AWS_ENDPOINT_URL"], _no_fault, made.gate) as proxy:
            names = {name: value for name, value in reach.items() if name.startswith("AWS_")}
            made.env = {**env, **names, "AWS_ENDPOINT_URL": proxy.address}
            try:
                made.start()
                with mock.patch.dict(os.environ, names):
                    yield made, proxy
            finally:
                made.close()  # before the store, which the hosts still write to
    finally:
        made.close()
        if keep is not None:
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(folder, keep, symlinks=True, ignore=_no_sockets)
        shutil.rmtree(folder, ignore_errors=True)


def progress(run: str) -> dict[str, Any] | None:
    """The latest progress message of a run in RUNS; None before the first."""
    try:
        return dict(storage.read_json(storage.join(RUNS, run, PROGRESS)))
    except FileNotFoundError:
        return None


def _no_fault(number: int, method: str, target: str) -> str | None:
    return None


def _no_sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(folder) / name).is_file() and not (Path(folder) / name).is_dir()]
