"""Connect to the Ray cluster that a run trains on: join a running one or start one on this machine.

This module must not import torch or Ray Train: they are imported while Ray's processes start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TypeVar

import ray
from ray.exceptions import AuthenticationError

from t2idist.config import ClusterConfig
from t2idist.launch import auth
from t2idist.launch.ray_internals import AuthenticationTokenLoader, Config

T = TypeVar("T")


def is_initialized() -> bool:
    """Return whether this process is already connected to a cluster."""
    return bool(ray.is_initialized())


@contextlib.contextmanager
def join_cluster(cluster: ClusterConfig) -> Iterator[None]:
    """Connect this process to the cluster at `cluster.address`, or to the one that its environment names."""
    connects = not is_initialized()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(_unless_set(_settings(cluster))))
        if connects:
            _join(cluster.address)
            stack.callback(ray.shutdown)
        stack.enter_context(_signals_interrupt())
        yield


def _join(address: str) -> None:
    try:
        ray.init(address=None if address == "auto" else address, logging_level=logging.WARNING)
    except (ConnectionError, AuthenticationError) as error:
        if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
            raise
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"{reason}: the cluster could not be joined without a token; if it has one, set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error


@contextlib.contextmanager
def start_local_cluster(cluster: ClusterConfig, prepare: Callable[[], T]) -> Iterator[T]:
    """Start Ray on this machine for this run alone; workers get the environment that Ray is started with.

    Args:
        prepare: called while Ray's processes start; the context yields what it returns or raises what it raises.
    """
    settings = {
        **_settings(cluster),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # draining this machine ends this process too
        "RAY_worker_niceness": "0",
    }
    cpus = max(os.cpu_count() or 1, int(cluster.workers[0] * cluster.cpus_per_worker))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="t2idist-ray-", ignore_cleanup_errors=True))
        stack.enter_context(_environment(_unless_set(settings)))
        stack.enter_context(_authentication(cluster.require_token))
        prepared = stack.enter_context(ThreadPoolExecutor(1, "prepare")).submit(prepare)
        with _environment(thread_settings(cluster)):
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=folder,
            )
        stack.callback(ray.shutdown)
        stack.enter_context(_signals_interrupt())
        yield prepared.result()


def in_main_thread() -> bool:
    """Return whether this thread may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def thread_settings(cluster: ClusterConfig) -> dict[str, str]:
    """Return the environment variables that limit each worker's threads to its cores."""
    threads = str(max(1, int(cluster.cpus_per_worker)))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def _settings(cluster: ClusterConfig) -> dict[str, str]:
    """Return Ray's environment variables; Ray Train passes its own on to its controller and workers."""
    return {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{min(1.0, cluster.dead_after_seconds / 5):g}",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{cluster.dead_after_seconds:g}",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{cluster.start_within_seconds:g}",
    }


def _unless_set(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in os.environ}


@contextlib.contextmanager
def _authentication(required: bool) -> Iterator[None]:
    """Protect a cluster that is started in the block with the user's token, else with one that ends with the block.

    Without a token, Ray would write one into the home folder, readable by all users, and keep it there.
    """
    variables = {"RAY_AUTH_MODE": "token"}
    with contextlib.ExitStack() as stack:
        stack.callback(_read_authentication_again)
        if not required and os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
            variables = {}  # switched off by the user
        elif not auth.has_token(os.environ, Path.home()):
            # a folder of its own, because Ray lets everybody write into its folder for temporary files
            folder = tempfile.TemporaryDirectory(prefix="t2idist-token-", ignore_cleanup_errors=True)
            file = Path(stack.enter_context(folder)) / "token"
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(32))
            variables["RAY_AUTH_TOKEN_PATH"] = str(file)
        stack.enter_context(_environment(variables))
        _read_authentication_again()
        yield


def _read_authentication_again() -> None:
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt(signal number) on SIGTERM and Ctrl-C while the block runs.

    Ray's own SIGTERM handler ends the process with a stack dump; asyncio's Ctrl-C handler waits for Ray's calls.
    """
    if not in_main_thread():
        yield
        return
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as a shell sets it for background jobs
    numbers = (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:  # Ray's calls raise one without an argument
        raise KeyboardInterrupt(*received[:1]) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the block runs."""
    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
