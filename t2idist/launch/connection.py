"""Connect to the Ray cluster that a run trains on: join a running one or start one on this machine.

This module must not import torch or Ray Train: they are imported while Ray's processes start.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TypeVar

import ray
from ray.exceptions import RayError

from t2idist.config import ClusterConfig
from t2idist.launch import auth
from t2idist.launch.ray_internals import AuthenticationTokenLoader, Config
from t2idist.observability.command import in_main_thread

T = TypeVar("T")

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def join_cluster(cluster: ClusterConfig) -> Iterator[None]:
    """Connect this process to the cluster at `cluster.address`, or to the one that its environment names."""
    with _environment(_unless_set(_settings(cluster))), _join(cluster.address), signals_interrupt():
        yield


@contextlib.contextmanager
def join_workers(address: str) -> Iterator[None]:
    """Connect this process to a cluster ("auto": the one that it belongs to) for tasks that need no run."""
    warning = auth.check_cluster(auth.cluster_address(address, os.environ), os.environ, Path.home(), required=False)
    if warning:
        logger.warning(warning)
    with _join(address):
        yield


@contextlib.contextmanager
def start_workers(workers: int, gpus: int) -> Iterator[float]:
    """Start Ray on this machine for tasks that need no run; yields the GPUs of each worker, at most `gpus`.

    Raises:
        ValueError: workers need a GPU, and Ray finds none on this machine.
    """
    with _authentication(required=False), _own_ray(workers, None if gpus else 0):
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield gpu_share(gpus, workers, int(resources.get("GPU", 0)))


@contextlib.contextmanager
def start_ray(cpus: int, *, with_gpus: bool) -> Iterator[None]:
    """Start Ray on this machine for a server, with the GPUs of this machine or without."""
    with _authentication(required=False), _own_ray(cpus, None if with_gpus else 0):
        yield


def gpu_share(gpus: int, workers: int, available: int) -> float:
    """Return the GPUs of each worker: `gpus`, or, if there are too few, the fraction of one that it shares.

    Raises:
        ValueError: there is none.
    """
    if gpus * workers <= available:
        return gpus
    if not available:
        raise ValueError(f"{workers} workers on GPUs, but Ray finds no GPU on this machine; use the CPU")
    return math.floor(1e4 / math.ceil(workers / available)) / 1e4  # Ray counts in 1/10,000


@contextlib.contextmanager
def _join(address: str) -> Iterator[None]:
    """Connect this process to a cluster, unless it is connected to one.

    Raises:
        ConnectionError: there is no cluster at the address, or it refuses this process.
    """
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, RayError) as error:
        reason = " ".join(str(error).split())
        if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
            hint = "with the token of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token; use that of its head"
        else:
            hint = "without a token; if it has one, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        raise ConnectionError(f"{reason}: the cluster could not be joined {hint}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def start_local_cluster(cluster: ClusterConfig, prepare: Callable[[], T]) -> Iterator[T]:
    """Start Ray on this machine for this run alone; workers get the environment that Ray is started with.

    Args:
        prepare: called while Ray's processes start; the context yields what it returns or raises what it raises.
    """
    settings = {
        **_settings(cluster),
        "RAY_worker_niceness": "0",
    }
    cpus = max(os.cpu_count() or 1, int(cluster.workers[0] * cluster.cpus_per_worker))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(_unless_set(settings)))
        stack.enter_context(_authentication(cluster.require_token))
        prepared = stack.enter_context(ThreadPoolExecutor(1, "prepare")).submit(prepare)
        with _environment(thread_settings(cluster)):
            stack.enter_context(_own_ray(cpus))
        stack.enter_context(signals_interrupt())
        yield prepared.result()


@contextlib.contextmanager
def _own_ray(cpus: int, gpus: int | None = None) -> Iterator[None]:
    """Start Ray on this machine; `gpus` None: as many as there are."""
    with tempfile.TemporaryDirectory(prefix="t2idist-ray-", ignore_cleanup_errors=True) as folder:
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=folder,
            )
        except Exception as error:
            if type(error) is not Exception:  # Ray raises this one if its processes do not start in time
                raise
            raise RuntimeError(f"Ray did not start; try again when this machine is less busy: {error}") from error
        try:
            yield
        finally:
            ray.shutdown()


def thread_settings(cluster: ClusterConfig) -> dict[str, str]:
    """Return the environment variables that limit each worker's threads to its cores."""
    threads = str(max(1, int(cluster.cpus_per_worker)))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def _settings(cluster: ClusterConfig) -> dict[str, str]:
    """Return Ray's environment variables; Ray Train passes its own on to its controller and workers."""
    return {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor that starts with every group; WatchDrainingNodes does it
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{min(0.5, cluster.dead_seconds / 5):g}",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{cluster.dead_seconds:g}",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{cluster.start_seconds:g}",
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
def signals_interrupt() -> Iterator[None]:
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
