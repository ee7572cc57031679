"""Worker processes that outlive their worker group.

Ray Train ends all processes of a group when one worker is lost or the number of workers changes, and starts new ones,
which import and build what the old ones had in memory. Here a group's placement group only reserves its resources; the
processes are actors without resources of their own, on the same nodes. Those that are still well serve the next group,
and every node has a spare one that has imported what training needs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from t2idist.launch.pooled_worker import PooledWorker
from t2idist.launch.ray_internals import (
    ControllerCallback,
    WorkerGroupCallback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from t2idist.launch.replica_store import result_or_none
from t2idist.launch.resources import accelerator_ids, alive_nodes
from t2idist.observability import process

logger = logging.getLogger(__name__)

_RECYCLE_SECONDS = 3.0
_RESPONSE_SECONDS = 2.0
_LOADING_RESPONSE_SECONDS = 0.3
"""Of a process that may be loading: imports hold up its other threads."""
_SHORT_OF_MEMORY_SECONDS = 30.0
_SPARES_AFTER_SECONDS = 10.0
"""After the start of a group: its first steps need the cores."""


@dataclass(frozen=True)
class _Process:
    """A process of the pool that serves no group."""

    actor: Any
    node: str
    accelerator_ids: tuple[str, ...] | None
    """None: it has not used any device."""
    prepared: Any
    """Result of `PooledWorker.prepare`; None: it has trained."""
    since: float = field(default_factory=time.monotonic)
    """When it was started or had trained, as `time.monotonic()`."""

    def has_started(self) -> bool:
        return self.prepared is None or bool(ray.wait([self.prepared], timeout=0)[0])

    def has_memory(self) -> bool:
        """Return whether this process, which has started, had the memory to prepare."""
        return self.prepared is None or bool(result_or_none(self.prepared, _RESPONSE_SECONDS))


class WorkerPool(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """The processes of a run that serve no group at present. Lives with Ray Train's controller.

    Args:
        environment: Of the worker processes.
        spares: Prepared processes that every node is to have beside those of the group.
        start_seconds: How long a process may take to start.
        keeps_processes: Whether processes can serve another group.
        run_url: The run folder.
        systems: Systems of the stages.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        spares: int,
        start_seconds: float,
        keeps_processes: bool = True,
        run_url: str = "",
        systems: Sequence[str] = (),
    ) -> None:
        self._environment, self._spares, self._start_seconds = dict(environment), spares, start_seconds
        self._run_url, self._systems = run_url, list(systems)
        self.keeps_processes = keeps_processes
        self.starts_in_a_row = -1
        """Groups that were started since one has trained, without the present one."""
        self.had_lost_workers = False
        """Whether a process of the group that ended last was lost."""
        self._short_of_memory: dict[str, float] = {}
        """Nodes without the memory for a spare process, and when that was found, as `time.monotonic()`."""
        self._free: list[_Process] = []
        self._prepared: set[Any] = set()
        """Those of `_free` that are ready to train."""
        self._started, self._nodes = 0.0, set[str]()
        """When the group started to train, on which nodes; no nodes: their spare processes are started."""

    def __deepcopy__(self, memo: object) -> WorkerPool:
        """Return an empty pool: processes are not copied."""
        return WorkerPool(
            self._environment, self._spares, self._start_seconds, self.keeps_processes, self._run_url, self._systems
        )

    def start_first(self, slots: Mapping[str, int], workers: tuple[int, int]) -> None:
        """Start the processes of the first group, if it will have all of the cluster: they load while it is set up.

        Does nothing if there are processes.

        Args:
            slots: How many workers fit onto each node.
            workers: Numbers of workers of the smallest and the largest group.
        """
        smallest, largest = workers
        if not self._free and smallest <= sum(slots.values()) <= largest:
            for node, count in slots.items():
                self._prepare(node, count)

    def take(self, group: PlacementGroup, indices: Sequence[int], gpus: float) -> tuple[list[Any], list[Any]]:
        """Return a process for each of these bundles of a placement group, and Ray's metadata of each.

        Raises:
            RayError: a process has ended meanwhile, or does not respond.
        """
        nodes = placement_group_table(group)["bundles_to_node_id"]
        accelerators = accelerator_ids(group, indices, gpus)
        self._check({nodes[index] for index in indices})
        waiting = {each.actor: each for each in self._free}
        processes = [self._pop(nodes[index], ids) for index, ids in zip(indices, accelerators, strict=True)]
        if self.has_trained:
            reused = [waiting[each] for each in processes if each in waiting]
            used_before, new = sum(each.prepared is None for each in reused), len(processes) - len(reused)
            spare = len(reused) - used_before
            logger.info("new group of workers: %d used before, %d spare, %d new", used_before, spare, new)
        assigned = [each.assign.remote(ids) for each, ids in zip(processes, accelerators, strict=True)]
        try:
            return processes, ray.get(assigned, timeout=self._start_seconds)
        except RayError:
            _kill(processes)
            raise

    def prepare(self, nodes: Iterable[str]) -> None:
        """Start spare processes on these nodes, as many as are missing."""
        recently = time.monotonic() - _SHORT_OF_MEMORY_SECONDS
        for node in nodes:
            if self._short_of_memory.get(node, recently) <= recently:
                self._prepare(node, self._spares - sum(each.node == node for each in self._free))

    def unprepared(self, nodes: Collection[str]) -> set[str]:
        """Return the nodes among these on which a process loads and none is ready; start those that are missing.

        A process that has loaded for longer than a start may take does not count: its node is not waited for.
        """
        self.prepare(nodes)
        self._check(nodes)
        ready = {each.node for each in self._free if each.actor in self._prepared}
        young = time.monotonic() - self._start_seconds
        return ({each.node for each in self._free if each.since > young} & set(nodes)) - ready

    @property
    def has_trained(self) -> bool:
        """Whether a group has trained; before, no process is ready."""
        return self._started > 0

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self.starts_in_a_row += 1

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self.starts_in_a_row = -1
        self._drop_superfluous()
        self._started = time.monotonic()
        self._nodes = {worker.metadata.node_id for worker in worker_group.get_workers()}

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if self._nodes and time.monotonic() > self._started + _SPARES_AFTER_SECONDS:
            self.prepare(self._nodes)
            self._nodes = set()

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Take back the processes of the group that are well, and end the others."""
        status = worker_group.get_latest_poll_status()
        lost = {rank for rank, error in status.errors.items() if is_lost(error)} if status is not None else set()
        workers = worker_group.get_workers()
        self._end_stopped(workers, status)
        self.had_lost_workers = bool(lost)
        _kill(workers[rank].actor for rank in lost)
        kept = [worker for rank, worker in enumerate(workers) if rank not in lost]
        addresses = [workers[rank].metadata.node_ip for rank in lost] + _silent_addresses(kept)
        calls = {worker.actor.recycle.remote(_RECYCLE_SECONDS, addresses): worker for worker in kept}
        limit = _RECYCLE_SECONDS + _RESPONSE_SECONDS
        ready, pending = ray.wait(list(calls), num_returns=len(calls), timeout=limit) if calls else ([], [])
        for call in [*ready, *pending]:
            worker = calls[call]
            reason = result_or_none(call, _RESPONSE_SECONDS) if call in ready else None
            if reason == "":
                ids = tuple(worker.metadata.accelerator_ids.get("GPU", ()))
                self._free.append(_Process(worker.actor, worker.metadata.node_id, ids, None))
            else:
                self.had_lost_workers |= reason is None
                logger.warning(
                    "a worker on %s is replaced: %s", worker.metadata.node_ip, reason or "it does not respond"
                )
                _kill([worker.actor])
        workers.clear()  # so that Ray Train ends none of them

    async def before_controller_shutdown(self) -> None:
        _kill(each.actor for each in self._free)
        self._free = []

    def _end_stopped(self, workers: Sequence[Any], status: Any) -> None:
        """End the processes that do not respond by a neighbour: Ray first waits for them to end by themselves."""
        errors = status.errors if status is not None else {}
        silent = [workers[rank] for rank, each in errors.items() if isinstance(each, WorkerHealthCheckTimeoutError)]
        well = {worker.metadata.node_id: worker.actor for rank, worker in enumerate(workers) if rank not in errors}
        neighbours = {each.node: each.actor for each in self._free if each.has_started()} | well
        for worker in silent:
            if worker.metadata.node_id in neighbours:
                neighbours[worker.metadata.node_id].execute.remote(process.kill, worker.metadata.pid)

    def _pop(self, node: str, accelerator_ids: Sequence[str]) -> Any:
        """Remove a process of this node from the pool and return it; a new one if there is none."""
        there = [each for each in self._free if each.node == node]
        ids = tuple(accelerator_ids)
        usable = [each for each in there if each.accelerator_ids in (ids, None)]
        if not usable:
            return self._start(node)
        best = max(usable, key=lambda each: (each.accelerator_ids is not None, each.actor in self._prepared))
        self._free.remove(best)
        return best.actor

    def _prepare(self, node: str, count: int) -> None:
        for _ in range(count):
            actor = self._start(node)
            self._free.append(_Process(actor, node, None, actor.prepare.remote(self._run_url, self._systems)))

    def _start(self, node: str) -> Any:
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(num_cpus=0)(PooledWorker).options(scheduling_strategy=strategy).remote(self._environment)

    def _check(self, nodes: Collection[str]) -> None:
        """Find out which processes of these nodes are ready to train; end those without memory or a response.

        One that has not trained yet may be silent as long as a start may take: imports hold up its other threads.
        """
        alive = alive_nodes()
        elsewhere = [each for each in self._free if each.node in alive and each.node not in nodes]
        here = [each for each in self._free if each.node in alive and each.node in nodes]
        started = [each for each in here if each.has_started()]
        starting = [each for each in here if each not in started]
        short = [each for each in started if not each.has_memory()]
        self._short_of_memory |= {each.node: time.monotonic() for each in short}
        pings = {each.actor.is_prepared.remote(): each for each in started if each not in short}
        trained = [ping for ping, each in pings.items() if each.prepared is None]
        if trained:
            ray.wait(trained, num_returns=len(trained), timeout=_RESPONSE_SECONDS)
        seconds = _LOADING_RESPONSE_SECONDS
        ready, silent = ray.wait(list(pings), num_returns=len(pings), timeout=seconds) if pings else ([], [])
        answers = {pings[ping]: result_or_none(ping, _RESPONSE_SECONDS) for ping in ready}
        young = time.monotonic() - self._start_seconds
        loading = [pings[ping] for ping in silent if pings[ping].prepared is not None and pings[ping].since > young]
        keep = elsewhere + starting + loading + [each for each, answer in answers.items() if answer is not None]
        _kill(each.actor for each in self._free if each not in keep)
        self._free = keep
        self._prepared = {each.actor for each, answer in answers.items() if answer}

    def _drop_superfluous(self) -> None:
        """End the processes that hold a device which the group does not use, and more than the spares of a node."""
        keep: list[_Process] = []
        for each in sorted(self._free, key=lambda each: each.actor not in self._prepared):
            same_node = sum(other.node == each.node for other in keep)
            if not each.accelerator_ids and same_node < self._spares:
                keep.append(each)
            else:
                _kill([each.actor])
        self._free = keep


def _silent_addresses(workers: Sequence[Any]) -> list[str]:
    """Return the addresses of the workers that do not respond, such as one whose node is lost since the last poll.

    Not the address of this node: the others report to it.
    """
    pings = {worker.actor.is_prepared.remote(): worker.metadata.node_ip for worker in workers}
    silent = ray.wait(list(pings), num_returns=len(pings), timeout=_RESPONSE_SECONDS)[1] if pings else []
    own: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return [pings[ping] for ping in silent if pings[ping] != own]


def is_lost(error: BaseException) -> bool:
    """Return whether a worker's error is that its process ended or does not respond, not one of its training."""
    return isinstance(error, WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError)


def _kill(actors: Iterable[Any]) -> None:
    for actor in actors:
        ray.kill(actor)
