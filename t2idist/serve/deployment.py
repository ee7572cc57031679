"""Serve on Ray: replicas of one app behind Ray Serve's proxy, on a cluster of its own or on a running one."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ray
import torch
from ray import serve as ray_serve
from ray.exceptions import RayError
from starlette.types import ASGIApp

from t2idist import storage
from t2idist.launch import connection
from t2idist.serve.api import create_app
from t2idist.serve.drawer import Drawer, ServeConfig, check_export
from t2idist.serve.gate import GateConfig

NAME = "t2idist"
MORE_REQUESTS = 32
"""Requests for the page and for health that a replica takes beside a full queue of images."""
HEALTH_PERIOD_SECONDS = 2.0
HEALTH_TIMEOUT_SECONDS = 30.0
START_ATTEMPTS = 2
SECONDS_TO_FINISH = 10.0
"""How long a replica that is stopped goes on with the requests that it has."""


@dataclass(frozen=True)
class Replicas:
    """The processes that draw."""

    count: int
    cpus: float
    gpus: float
    address: str
    """Ray cluster that they run on; "": one that is started for them."""


@ray_serve.ingress()
class Replica:
    """One process that draws: the app, as ``--local`` serves it."""

    def __init__(self, config: ServeConfig, gate: GateConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self._gate = gate
        self._drawer = Drawer(config)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._drawer, self._gate)

    async def check_health(self) -> None:
        """Raise RuntimeError if this replica cannot draw any more; Ray Serve then replaces it."""
        if (problem := self._drawer.problem()) is not None:
            raise RuntimeError(problem)


def serve_on_ray(
    config: ServeConfig, gate: GateConfig, replicas: Replicas, port: int, ready: Callable[[], None]
) -> None:
    """Serve until KeyboardInterrupt; calls `ready` as soon as all replicas can draw.

    Raises:
        ValueError: the export cannot be served, or this machine or cluster cannot hold the replicas.
        RuntimeError: the replicas did not start.
    """
    if not replicas.address:
        _check_room(replicas, torch.cuda.device_count(), "this machine")
    check_export(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with _cluster(replicas):
        if replicas.address:
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            _check_room(replicas, resources.get("GPU", 0), "the cluster")
        if ray_serve.status().proxies:
            raise ValueError("Ray Serve already runs on this cluster, with its own port; end it with: serve shutdown")
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": gate.host, "port": port}, logging_config=quiet)
        try:
            _run(config, gate, replicas)
            ready()
            threading.Event().wait()
        finally:
            ray_serve.shutdown()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _cluster(replicas: Replicas) -> Iterator[None]:
    if replicas.address:
        with connection.join_workers(replicas.address), connection.signals_interrupt():
            yield
    else:
        cpus = max(1, math.ceil(replicas.count * replicas.cpus))
        with connection.start_ray(cpus, with_gpus=replicas.gpus > 0), connection.signals_interrupt():
            yield


def _check_room(replicas: Replicas, gpus: float, where: str) -> None:
    """Raise ValueError for replicas that need more GPUs than there are: Ray would wait for more machines."""
    needed = replicas.gpus
    per_gpu = math.floor(1 / needed) if 0 < needed <= 1 else 0
    room = int(gpus) * per_gpu if per_gpu else int(gpus // needed) if needed else replicas.count
    if room < replicas.count:
        raise ValueError(
            f"--replicas {replicas.count} with {needed:g} GPUs each: {where} has {gpus:g} GPUs; give fewer replicas, a "
            "smaller --gpus-per-replica, or --device cpu"
        )


def _run(config: ServeConfig, gate: GateConfig, replicas: Replicas) -> None:
    """Start the replicas and wait until they can draw."""
    deployment = ray_serve.deployment(
        Replica,
        name=NAME,
        num_replicas=replicas.count,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        max_ongoing_requests=config.queue + MORE_REQUESTS,
        max_queued_requests=config.queue,
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
        graceful_shutdown_timeout_s=SECONDS_TO_FINISH,
        max_constructor_retry_count=START_ATTEMPTS,
    )
    app = deployment.bind(config, gate, max(1, int(replicas.cpus)))  # type: ignore[attr-defined]
    try:
        ray_serve.run(app, name=NAME, route_prefix="/")
    except (RuntimeError, RayError) as error:
        where = storage.redact(config.export)
        raise RuntimeError(f"{where}: the replicas did not start: {' '.join(str(error).split())[:300]}") from error
