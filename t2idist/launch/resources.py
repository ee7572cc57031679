"""Nodes of the Ray cluster and what they offer: liveness, free worker slots, reservations, placement groups."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import PlacementGroupID
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from t2idist import storage
from t2idist.config import ClusterConfig
from t2idist.launch import ray_internals
from t2idist.launch.replica_store import RayReplicaStore

RESERVATION = "reservation.json"
_COORDINATOR_SECONDS = 5.0
_POLL_SECONDS = 2.0
_PING_SECONDS = 1.0
_PING_AGAIN_SECONDS = 2.0


class NodeLiveness:
    """Finds out which nodes respond.

    A node that stops responding counts as alive until Ray's health check declares it dead, and workers that are started
    on it would not start. Every node that had a worker runs a replica actor, so we ping the actors.

    Args:
        wait_seconds: How long to wait until each node responds or is declared dead; 0 if the run can do without it.
    """

    def __init__(self, replicas: RayReplicaStore, wait_seconds: float) -> None:
        self._replicas, self._wait_seconds = replicas, wait_seconds
        self._pinged = -math.inf
        self.silent: set[str] = set()
        """Ids of the nodes that count as alive and whose replica actors did not respond to the last ping."""
        self.unprepared: set[str] = set()
        """Ids of the nodes that the next group leaves out, because no process there is ready to train."""

    def ping(self) -> set[str]:
        """Ping every replica actor once; return, and keep as `silent`, the nodes that count as alive in silence."""
        with contextlib.suppress(RayError):
            self.silent = set(self._replicas.unresponsive_nodes(_PING_SECONDS)) & alive_nodes().keys()
            self._pinged = time.monotonic()
        return self.silent

    def check(self) -> None:
        """Ping until all nodes respond or the same ones stay silent, then refresh Ray's autoscaling coordinator.

        A result is used again for two seconds: a node that does not respond delays every ping.
        """
        deadline = time.monotonic() + self._wait_seconds
        sure = time.monotonic() < self._pinged + _PING_AGAIN_SECONDS and not (self.silent and self._wait_seconds)
        while not sure:
            known, silent = self.silent, self.ping()
            sure = not silent or (silent <= known and time.monotonic() >= deadline)
            if not sure:
                time.sleep(_PING_SECONDS / 4)
        with contextlib.suppress(ValueError, RayError):
            ray.get(_coordinator().get_reserved_resources.remote("", recompute=True), timeout=_COORDINATOR_SECONDS)


def schedulable_nodes() -> dict[str, dict[str, float]]:
    """Return `alive_nodes` without draining nodes, on which Ray starts nothing."""
    draining: dict[str, int] = ray_internals.state.get_draining_nodes()
    return {node: resources for node, resources in alive_nodes().items() if node not in draining}


def alive_nodes() -> dict[str, dict[str, float]]:
    """Return the total resources of every node that Ray considers alive, by node id."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}


def per_worker(cluster: ClusterConfig) -> dict[str, float]:
    """Return the resources of a worker."""
    return {"CPU": cluster.cpus_per_worker, "GPU": float(cluster.gpus_per_worker)}


def worker_slots(needed: Mapping[str, float]) -> dict[str, int]:
    """Return how many workers of these resources fit onto each schedulable node; a worker never spans two nodes."""
    needs = nonzero(needed).items()
    return {
        node: min(int(has.get(kind, 0.0) / amount + 1e-9) for kind, amount in needs)
        for node, has in schedulable_nodes().items()
    }


def room(cluster: ClusterConfig) -> int:
    """Return how many workers of a run fit onto the Ray cluster."""
    return sum(worker_slots(per_worker(cluster)).values())


def nonzero(resources: Mapping[str, float]) -> dict[str, float]:
    """Return the resources without those of amount 0."""
    return {kind: amount for kind, amount in resources.items() if amount > 0}


@contextlib.contextmanager
def request_workers(needed: Mapping[str, float], workers: int) -> Iterator[None]:
    """Ask Ray's autoscaler, if the cluster has one, for room for `workers` workers while the block runs."""
    request_resources(bundles=[nonzero(needed)] * workers)
    try:
        yield
    finally:
        request_resources(bundles=[])


class Reservation:
    """The resources that Ray's autoscaling coordinator reserves for an elastic run: they limit its number of workers.

    By itself the coordinator polls the nodes every 20 s only, and keeps the reservation of a dead driver for 180 s. In
    the block it polls every two seconds, and `acquire` releases the reservation of the previous submission. The
    coordinator does not limit runs with a fixed number of workers.
    """

    def __init__(self, run_url: str, cluster: ClusterConfig) -> None:
        self._url = storage.join(run_url, RESERVATION)
        self._holder = ""
        self._elastic = cluster.workers[0] < cluster.workers[1]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="nodes", daemon=True)

    def __enter__(self) -> Reservation:
        if self._elastic:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._elastic:
            self._thread.join()
        self._release(self._holder)

    def acquire(self, holder: str) -> None:
        """Release the reservation of the previous attempt and note `holder`, the coordinator's name for this one."""
        previous = storage.read_json_if_present(self._url)
        if previous is not None:
            self._release(previous["holder"])
        storage.write_json(self._url, {"holder": holder})
        self._holder = holder

    def _release(self, holder: str) -> None:
        with contextlib.suppress(ValueError, RayError):  # ValueError: no coordinator, so nothing is reserved
            ray.get(_coordinator().cancel_request.remote(holder), timeout=_COORDINATOR_SECONDS)

    def _poll(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            with contextlib.suppress(ValueError, RayError):
                call = _coordinator().get_reserved_resources.remote(self._holder, recompute=True)
                ray.get(call, timeout=_COORDINATOR_SECONDS)


def own_placement_groups() -> set[str]:
    """Return the ids of this Ray job's placement groups; an id ends with the id of its job."""
    job = ray.get_runtime_context().get_job_id()
    try:
        table: dict[str, dict[str, Any]] = ray.util.placement_group_table()  # type: ignore[no-untyped-call]
    except RayError:
        return set()
    return {group for group, facts in table.items() if facts["state"] != "REMOVED" and group.endswith(job)}


def remove_placement_groups(groups: Iterable[str]) -> None:
    """Remove placement groups that a dead controller left behind.

    Ray keeps them if its State API (part of the dashboard) does not run, and the workers of the next controller would
    wait for their resources forever.
    """
    for group in groups:
        with contextlib.suppress(RayError):
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def accelerator_ids(group: PlacementGroup, indices: Sequence[int], gpus: float) -> list[list[str]]:
    """Return the ids of the GPUs that each bundle has reserved."""
    if not gpus:
        return [[] for _ in indices]
    calls = []
    for index in indices:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        task = ray.remote(num_cpus=0, num_gpus=gpus)(_gpu_ids).options(scheduling_strategy=strategy)
        calls.append(task.remote())
    return list(ray.get(calls))


def _gpu_ids() -> list[str]:
    """Run as a task in a bundle: return the ids of its GPUs."""
    return [str(each) for each in ray.get_runtime_context().get_accelerator_ids()["GPU"]]


def _coordinator() -> Any:
    """Return Ray's own autoscaling coordinator; raises ValueError if there is none."""
    return ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
