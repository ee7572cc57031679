"""A cluster of several hosts for one test or tool, with a store behind a fault proxy."""

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
from tests.helpers.fault_proxy import FaultProxy, fault_proxy
from tests.helpers.object_store import seaweedfs
from tools.chaos.hosts import Cluster, check_machine, environment, free_subnet

RUNS = "s3://bucket/runs"


@contextmanager
def cluster(
    hosts: int = 3, *, dead_after_seconds: float = 10.0, cpus_per_host: int = 1, keep: Path | None = None
) -> Iterator[tuple[Cluster, FaultProxy]]:
    """Run a cluster; yields it and the proxy between its hosts and the store.

    Within the block, this process's environment names the store.

    Args:
        dead_after_seconds: Ray declares a host dead if it does not respond for this long.
        keep: folder that keeps the nodes' logs.

    Raises:
        Unsupported: this machine cannot run such hosts.
    """
    check_machine()
    folder = Path(tempfile.mkdtemp(prefix="t2h-", dir="/tmp"))  # short: sockets are in it
    check_ms = int(1000 * dead_after_seconds / 3)
    env = environment(secrets.token_hex(32), health_period_ms=check_ms // 3, health_timeout_ms=check_ms - check_ms // 3)
    hosts_cluster = Cluster(str(os.getpid()), hosts, folder, free_subnet(), env, cpus_per_host)
    try:
        hosts_cluster.make_bridge()
        with (
            seaweedfs(hosts_cluster.gateway) as store_env,
            fault_proxy(store_env["AWS_ENDPOINT_URL"], _no_fault, hosts_cluster.gateway) as proxy,
        ):
            names = {name: value for name, value in store_env.items() if name.startswith("AWS_")}
            hosts_cluster.env = {**env, **names, "AWS_ENDPOINT_URL": proxy.address}
            try:
                hosts_cluster.start()
                with mock.patch.dict(os.environ, names):
                    yield hosts_cluster, proxy
            finally:
                hosts_cluster.close()  # before the store, to which the hosts still write
    finally:
        hosts_cluster.close()
        if keep is not None:
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(folder, keep, symlinks=True, ignore=_no_sockets)
        shutil.rmtree(folder, ignore_errors=True)


def progress(run: str) -> dict[str, Any] | None:
    """Return the latest progress message of a run in RUNS; None before the first."""
    try:
        return dict(storage.read_json(storage.join(RUNS, run, PROGRESS)))
    except FileNotFoundError:
        return None


def _no_fault(number: int, method: str, target: str) -> str | None:
    return None


def _no_sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(folder) / name).is_file() and not (Path(folder) / name).is_dir()]
