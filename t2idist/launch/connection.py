"""The Ray cluster that a run trains on: one that is there, or one of its own on this machine.

Nothing here needs torch or Ray Train: what does is imported beside the start of Ray's processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import TypeVar

import ray

from t2idist.config import ClusterConfig

T = TypeVar("T")


def is_initialized() -> bool:
    """Whether this process belongs to a cluster already."""
    return bool(ray.is_initialized())


@contextlib.contextmanager
def join_cluster(cluster: ClusterConfig) -> Iterator[None]:
    """Inside, this process belongs to the cluster at `cluster.address`, or to the one that its environment names."""
    ours = not is_initialized()
    with contextlib.ExitStack() as around:
        around.enter_context(_environment(_unless_set(_settings(cluster))))
        if ours:
            ray.init(address=None if cluster.address == "auto" else cluster.address, logging_level=logging.WARNING)
            around.callback(ray.shutdown)
        around.enter_context(_signals_interrupt())
        yield


@contextlib.contextmanager
def start_local_cluster(cluster: ClusterConfig, prepare: Callable[[], T]) -> Iterator[T]:
    """Inside, Ray runs on this machine, for this run alone: workers get the environment that Ray is started with.

    prepare: done while Ray's processes start; what it gives or raises comes from here.
    """
    settings = {
        **_settings(cluster),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # who drains this machine ends this process
        "RAY_worker_niceness": "0",
    }
    cpus = max(os.cpu_count() or 1, int(cluster.workers[0] * cluster.cpus_per_worker))
    with contextlib.ExitStack() as around:
        folder = around.enter_context(tempfile.TemporaryDirectory(prefix="t2idist-ray-", ignore_cleanup_errors=True))
        around.enter_context(_environment(_unless_set(settings)))
        prepared = around.enter_context(ThreadPoolExecutor(1, "prepare")).submit(prepare)
        with _environment(thread_settings(cluster)):
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=folder,
            )
        around.callback(ray.shutdown)
        around.enter_context(_signals_interrupt())
        yield prepared.result()


def in_main_thread() -> bool:
    """Whether this thread may say what signals do."""
    return threading.current_thread() is threading.main_thread()


def thread_settings(cluster: ClusterConfig) -> dict[str, str]:
    """Environment variables of the workers, by which each computes on the cores that it has."""
    number = str(max(1, int(cluster.cpus_per_worker)))
    return {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number}


def _settings(cluster: ClusterConfig) -> dict[str, str]:
    """Ray's own settings; Ray Train hands its on from this process to its controller and its workers."""
    return {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{min(1.0, cluster.dead_after_seconds / 5):g}",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{cluster.dead_after_seconds:g}",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{cluster.start_within_seconds:g}",
    }


def _unless_set(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in os.environ}


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C end what runs by KeyboardInterrupt, with the signal's number as its argument.

    Ray's own handler of SIGTERM ends the process with a dump of its stack; asyncio's of Ctrl-C waits for Ray's calls.
    """
    if not in_main_thread():
        yield
        return
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as a shell has it for what runs in its background
    numbers = (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:  # Ray's calls raise one of their own
        raise KeyboardInterrupt(*received[:1]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
