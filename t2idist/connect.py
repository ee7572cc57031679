"""The Ray cluster that a run trains on: one that is there, or one of its own on this machine.

Nothing here needs torch or Ray Train: what does is imported beside the start of Ray's processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import ray

from t2idist.config import ClusterConfig

T = TypeVar("T")


def is_up() -> bool:
    """Whether this process belongs to a cluster already."""
    return bool(ray.is_initialized())


@contextlib.contextmanager
def joined(cluster: ClusterConfig) -> Iterator[None]:
    """Inside, this process belongs to the cluster at `cluster.address`, or to the one that its environment names."""
    _set_missing(_train_settings(cluster))
    ours = not is_up()
    if ours:
        ray.init(address=None if cluster.address == "auto" else cluster.address, logging_level=logging.WARNING)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def started(cluster: ClusterConfig, prepare: Callable[[], T]) -> Iterator[T]:
    """Inside, Ray runs on this machine, for this run alone: workers get the environment that Ray is started with.

    prepare: done while Ray's processes start; what it gives or raises comes from here.
    """
    _set_missing(
        {
            **_train_settings(cluster),
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # who drains this machine ends this process
            "RAY_worker_niceness": "0",
        }
    )
    cpus = max(os.cpu_count() or 1, int(cluster.workers[0] * cluster.cpus_per_worker))
    with (
        tempfile.TemporaryDirectory(prefix="t2idist-ray-", ignore_cleanup_errors=True) as folder,
        ThreadPoolExecutor(1, "prepare") as beside,
    ):
        prepared = beside.submit(prepare)
        with _environment(threads(cluster)):
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=folder,
            )
        try:
            yield prepared.result()
        finally:
            ray.shutdown()


def threads(cluster: ClusterConfig) -> dict[str, str]:
    """Environment variables of the workers, by which each computes on the cores that it has."""
    number = str(max(1, int(cluster.cpus_per_worker)))
    return {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number}


def _train_settings(cluster: ClusterConfig) -> dict[str, str]:
    """Ray's own settings; Ray Train hands its on from this process to its controller and its workers."""
    return {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{min(1.0, cluster.dead_after_seconds / 5):g}",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{cluster.dead_after_seconds:g}",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{cluster.start_within_seconds:g}",
    }


def _set_missing(settings: Mapping[str, str]) -> None:
    for name, value in settings.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside, processes that are started have these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
