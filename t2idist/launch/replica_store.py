"""Keepers on Ray: an actor on each machine that holds copies of the training's state in its memory.

They are `engine.held.Keepers`. They outlive workers and drivers; the end of the run, or half an hour in which nobody
calls, ends them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from t2idist.engine.checkpoint.replica_protocol import ReplicaInfo

_NAMESPACE = "t2idist"
_COPIES_HELD = 2
_IDLE_SECONDS = 1800.0
_ANSWER_SECONDS = 10.0
_TRANSFER_SECONDS = 60.0


class ReplicaActor:
    """Parts by key and rank, the newest last. Runs as an actor."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[int, list[tuple[ReplicaInfo, NDArray[np.uint8]]]]] = {}
        self._called = time.monotonic()
        threading.Thread(target=self._leave_when_idle, daemon=True).start()

    def put(self, key: str, held: ReplicaInfo, data: NDArray[np.uint8]) -> None:
        self._called = time.monotonic()
        parts = self._parts.setdefault(key, {}).setdefault(held.rank, [])
        space = parts.pop(0)[1] if len(parts) == _COPIES_HELD else None
        if space is None or space.nbytes != data.nbytes:
            space = np.empty_like(data)
        np.copyto(space, data)
        parts.append((held, space))

    def list_held(self, key: str) -> list[ReplicaInfo]:
        self._called = time.monotonic()
        return [held for parts in self._parts.get(key, {}).values() for held, _ in parts]

    def get(self, key: str, attempt: str, step: int, rank: int) -> NDArray[np.uint8] | None:
        self._called = time.monotonic()
        for held, data in self._parts.get(key, {}).get(rank, []):
            if (held.attempt, held.step) == (attempt, step):
                return data
        return None

    def forget(self, prefix: str) -> None:
        self._parts = {key: parts for key, parts in self._parts.items() if not key.startswith(prefix)}

    def _leave_when_idle(self) -> None:
        while time.monotonic() - self._called < _IDLE_SECONDS:
            time.sleep(_IDLE_SECONDS / 60)
        os._exit(0)


class RayReplicaStore:
    """The keepers of a run, as a worker reaches them. run_id: of the run folder, so that no other run's are met."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._mine: list[Any] = []

    def put(self, key: str, held: ReplicaInfo, data: memoryview) -> None:
        """Give a part to the keepers of this machine and of the next; raises OSError."""
        try:
            if not self._mine:
                self._mine = [self._start(node) for node in _two_nodes()]
            shared = ray.put(np.frombuffer(data, dtype=np.uint8))
            ray.get([keeper.put.remote(key, held, shared) for keeper in self._mine], timeout=_TRANSFER_SECONDS)
        except RayError as error:
            self._mine = []  # a machine may be gone: look again
            raise OSError(_first_line(error)) from None

    def list_held(self, key: str) -> list[ReplicaInfo]:
        calls = [keeper.list_held.remote(key) for keeper in self._living()]
        answered, _ = ray.wait(calls, num_returns=len(calls), timeout=_ANSWER_SECONDS) if calls else ([], [])
        found: dict[tuple[str, int, int], ReplicaInfo] = {}
        for call in answered:
            for held in _answer(call) or []:
                found[held.attempt, held.step, held.rank] = held
        return list(found.values())

    def get(self, key: str, held: ReplicaInfo) -> bytes:
        """The bytes of a part, from whichever keeper still has it; raises OSError."""
        for keeper in self._living():
            data = _answer(keeper.get.remote(key, held.attempt, held.step, held.rank))
            if data is not None:
                return bytes(data)
        raise OSError(f"part {held.rank} of step {held.step} is held nowhere any more")

    def forget(self, prefix: str) -> None:
        for keeper in self._living():
            keeper.forget.remote(prefix)

    def silent_nodes(self, seconds: float) -> list[str]:
        """Ids of the machines whose keepers do not answer within so many seconds."""
        pings = {keeper.list_held.remote(""): node for node, keeper in self._by_node()}
        answered, silent = ray.wait(list(pings), num_returns=len(pings), timeout=seconds) if pings else ([], [])
        return [pings[ping] for ping in silent] + [pings[ping] for ping in answered if _answer(ping) is None]

    def end(self) -> None:
        """End all keepers of the run."""
        for keeper in self._living():
            ray.kill(keeper)

    def _start(self, node: str) -> Any:
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = ray.remote(num_cpus=0)(ReplicaActor).options(
            name=f"{self._run_id}-{node}", namespace=_NAMESPACE, get_if_exists=True, lifetime="detached",
            scheduling_strategy=where,
        )  # fmt: skip
        return actor.remote()

    def _living(self) -> list[Any]:
        return [keeper for _, keeper in self._by_node()]

    def _by_node(self) -> Iterator[tuple[str, Any]]:
        for entry in ray.util.list_named_actors(all_namespaces=True):
            run_id, _, node = entry["name"].partition("-")
            if entry["namespace"] == _NAMESPACE and run_id == self._run_id:
                with contextlib.suppress(ValueError):  # has ended meanwhile
                    yield node, ray.get_actor(entry["name"], namespace=_NAMESPACE)


def _two_nodes() -> list[str]:
    """This machine and the next one, in an order that all machines agree on; one where there is no other."""
    own = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = sorted(node["NodeID"] for node in nodes if node["Alive"] and node["Resources"].get("CPU"))
    others = [node for node in alive if node > own] + [node for node in alive if node < own]
    return [own, *others[:1]]


def _answer(call: Any) -> Any:
    """What an actor answers; None where it does not."""
    try:
        return ray.get(call, timeout=_TRANSFER_SECONDS)
    except RayError:
        return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
