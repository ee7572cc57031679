"""Replicas in the memory of the cluster's nodes: one actor per node holds copies of checkpoint parts.

`RayReplicaStore` implements `engine.checkpoint.replica_protocol.ReplicaStore`. The actors outlive workers and drivers;
they end with the run, or after half an hour without a call.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from t2idist.engine.checkpoint.replica_protocol import ReplicaInfo

_NAMESPACE = "t2idist"
_REPLICAS_KEPT = 2
_IDLE_SECONDS = 1800.0
_RESPONSE_SECONDS = 10.0
_TRANSFER_SECONDS = 60.0


_ignored_nodes: set[str] = set()
"""Ids of nodes that did not respond when the group of this worker started."""


def ignore_nodes(nodes: Collection[str]) -> None:
    """Neither copy to the actors of these nodes nor wait for their responses, until the next call in this process."""
    _ignored_nodes.clear()
    _ignored_nodes.update(nodes)


class ReplicaActor:
    """Holds parts by key and rank, the newest last. Runs as a Ray actor, one per node."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[int, list[tuple[ReplicaInfo, NDArray[np.uint8]]]]] = {}
        self._last_call = time.monotonic()
        threading.Thread(target=self._exit_when_idle, daemon=True).start()

    def put(self, key: str, info: ReplicaInfo, data: NDArray[np.uint8]) -> None:
        self._last_call = time.monotonic()
        parts = self._parts.setdefault(key, {}).setdefault(info.rank, [])
        buffer = parts.pop(0)[1] if len(parts) == _REPLICAS_KEPT else None
        if buffer is None or buffer.nbytes != data.nbytes:
            buffer = np.empty_like(data)
        np.copyto(buffer, data)
        parts.append((info, buffer))

    def list_replicas(self, key: str) -> list[ReplicaInfo]:
        self._last_call = time.monotonic()
        return [info for parts in self._parts.get(key, {}).values() for info, _ in parts]

    def get(self, key: str, attempt: str, step: int, rank: int) -> NDArray[np.uint8] | None:
        self._last_call = time.monotonic()
        for info, data in self._parts.get(key, {}).get(rank, []):
            if (info.attempt, info.step) == (attempt, step):
                return data
        return None

    def forget(self, prefix: str) -> None:
        self._parts = {key: parts for key, parts in self._parts.items() if not key.startswith(prefix)}

    def _exit_when_idle(self) -> None:
        while time.monotonic() - self._last_call < _IDLE_SECONDS:
            time.sleep(_IDLE_SECONDS / 60)
        os._exit(0)


class RayReplicaStore:
    """A worker's access to the replica actors of its run.

    Args:
        run_id: id of the run folder; runs with other ids have other actors.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._targets: list[Any] = []

    def put(self, key: str, info: ReplicaInfo, data: memoryview) -> None:
        """Copy a part to the actors of this node and of the next one; raises OSError."""
        try:
            if not self._targets:
                self._targets = [self._start(node) for node in _target_nodes()]
            shared = ray.put(np.frombuffer(data, dtype=np.uint8))
            ray.get([actor.put.remote(key, info, shared) for actor in self._targets], timeout=_TRANSFER_SECONDS)
        except RayError as error:
            self._targets = []  # a node may be lost: choose again at the next put
            raise OSError(_first_line(error)) from None

    def list_replicas(self, key: str) -> list[ReplicaInfo]:
        calls = [actor.list_replicas.remote(key) for actor in self._actors()]
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=_RESPONSE_SECONDS) if calls else ([], [])
        replicas: dict[tuple[str, int, int], ReplicaInfo] = {}
        for call in ready:
            for info in result_or_none(call) or []:
                replicas[info.attempt, info.step, info.rank] = info
        return list(replicas.values())

    def get(self, key: str, info: ReplicaInfo) -> bytes:
        """Return the bytes of a part from any actor that still has it; raises OSError."""
        for actor in self._actors():
            data = result_or_none(actor.get.remote(key, info.attempt, info.step, info.rank))
            if data is not None:
                return bytes(data)
        raise OSError(f"no node holds part {info.rank} of step {info.step} any more")

    def forget(self, prefix: str) -> None:
        for actor in self._actors():
            actor.forget.remote(prefix)

    def unresponsive_nodes(self, seconds: float) -> list[str]:
        """Return the ids of the nodes whose actors do not respond within `seconds`."""
        pings = {actor.list_replicas.remote(""): node for node, actor in self._actors_by_node()}
        ready, pending = ray.wait(list(pings), num_returns=len(pings), timeout=seconds) if pings else ([], [])
        return [pings[ping] for ping in pending] + [pings[ping] for ping in ready if result_or_none(ping) is None]

    def shut_down(self) -> None:
        """End all actors of the run."""
        for actor in self._actors():
            ray.kill(actor)

    def _start(self, node: str) -> Any:
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = ray.remote(num_cpus=0)(ReplicaActor).options(
            name=f"{self._run_id}-{node}", namespace=_NAMESPACE, get_if_exists=True, lifetime="detached",
            scheduling_strategy=strategy,
        )  # fmt: skip
        return actor.remote()

    def _actors(self) -> list[Any]:
        return [actor for _, actor in self._actors_by_node()]

    def _actors_by_node(self) -> Iterator[tuple[str, Any]]:
        for entry in ray.util.list_named_actors(all_namespaces=True):
            run_id, _, node = entry["name"].partition("-")
            if entry["namespace"] == _NAMESPACE and run_id == self._run_id and node not in _ignored_nodes:
                with contextlib.suppress(ValueError):  # has ended meanwhile
                    yield node, ray.get_actor(entry["name"], namespace=_NAMESPACE)


def _target_nodes() -> list[str]:
    """Return this node and the next one in an order that all nodes agree on; only this one if there is no other."""
    own = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    usable = {node["NodeID"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")}
    alive = sorted(usable - _ignored_nodes)
    others = [node for node in alive if node > own] + [node for node in alive if node < own]
    return [own, *others[:1]]


def result_or_none(call: Any, seconds: float = _TRANSFER_SECONDS) -> Any:
    """Return the result of an actor call; None if the actor does not respond within `seconds`."""
    try:
        return ray.get(call, timeout=seconds)
    except RayError:
        return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
