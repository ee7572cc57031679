"""Which machines Ray Train counts on: its autoscaling coordinator made to look often, and to forget dead runs."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback

from t2idist import storage
from t2idist.keepers import RayKeepers

logger = logging.getLogger(__name__)

RESERVATION = "reservation.json"
_COORDINATOR_SECONDS = 5.0
_PING_SECONDS = 1.0


class KnownNodes(ControllerCallback):  # type: ignore[misc]
    """After a failure, lets Ray Train choose the new number of workers only when it is known which machines are left.

    A machine that falls silent counts as alive until Ray's health check gives it up; asked for before that, the new
    workers would wait for it until they are given up too, after `start_within_seconds`. Every machine that had a worker
    has a keeper: one that does not answer is waited for, until it does or Ray knows, but no longer than that.
    """

    def __init__(self, keepers: RayKeepers, start_within_seconds: float) -> None:
        self._keepers, self._start_within_seconds = keepers, start_within_seconds

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        deadline = time.monotonic() + self._start_within_seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(RayError):
                if not set(self._keepers.silent_nodes(_PING_SECONDS)) & alive_nodes():
                    break
            time.sleep(_PING_SECONDS / 4)
        with contextlib.suppress(ValueError, RayError):
            ray.get(_coordinator().get_reserved_resources.remote("", recompute=True), timeout=_COORDINATOR_SECONDS)


def alive_nodes() -> set[str]:
    """Ids of the machines that Ray takes to be alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"] for node in nodes if node["Alive"]}


class Reservation:
    """What Ray's autoscaling coordinator sets aside for an elastic run: it says how many workers there may be.

    It looks at the nodes every 20 s only, and keeps what a dead driver had set aside for 180 s. Here both are mended:
    it is made to look every second, and the last submission's share is given back before this one asks.
    """

    def __init__(self, run_url: str) -> None:
        self._where = storage.join(run_url, RESERVATION)
        self._holder = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="nodes", daemon=True)

    def __enter__(self) -> Reservation:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._give_back(self._holder)

    def hold(self, holder: str) -> None:
        """The coordinator knows this attempt by this name; what earlier ones held is given back."""
        before = storage.read_json(self._where)["holder"] if storage.exists(self._where) else ""
        self._give_back(before)
        storage.write_json(self._where, {"holder": holder})
        self._holder = holder

    def _give_back(self, holder: str) -> None:
        with contextlib.suppress(ValueError, RayError):  # ValueError: no coordinator, so nothing is set aside
            ray.get(_coordinator().cancel_request.remote(holder), timeout=_COORDINATOR_SECONDS)

    def _look(self) -> None:
        while not self._ended.wait(1.0):
            with contextlib.suppress(ValueError, RayError):
                call = _coordinator().get_reserved_resources.remote(self._holder, recompute=True)
                ray.get(call, timeout=_COORDINATOR_SECONDS)


def _coordinator() -> Any:
    """Ray's own actor; raises ValueError where there is none."""
    return ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
