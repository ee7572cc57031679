"""Ray's TorchTrainer with our scaling policies, in the driver's process, without idle actors."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import math
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer

from t2idist.launch import interfaces
from t2idist.launch.callbacks import CheckNodes
from t2idist.launch.health import WorkerHealth
from t2idist.launch.ray_internals import (
    DatasetsCallback,
    ElasticScalingPolicy,
    FixedScalingPolicy,
    PlacementGroupCleanerCallback,
    TrainController,
    Worker,
    WorkerGroup,
    WorkerGroupStartupFailedError,
    WorkerGroupState,
)
from t2idist.launch.resources import NodeLiveness, schedulable_nodes
from t2idist.launch.worker_pool import WorkerPool
from t2idist.training import accelerator

logger = logging.getLogger(__name__)

_UNPREPARED_POLL_SECONDS = 2.0
_LEAST_SHARE = 1 / 3
"""Of the workers for which there is room: with fewer on prepared nodes, the next group waits for the others."""
_PLACEMENT_SECONDS = 5.0
"""Ray has placed a group by then, unless a node was lost since its size was decided; doubled at each attempt."""


class _FirstWorkerListens:
    """A worker group in which the others join a process group once the first worker listens."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def __len__(self) -> int:
        return len(self._group)

    def execute_single_async(self, rank: int, function: Any, *arguments: Any, **settings: Any) -> Any:
        if rank == 0:
            return self._group.execute_single_async(rank, function, *arguments, **settings)
        call = interfaces.call_once_reachable
        return self._group.execute_single_async(rank, call, function, *arguments, **settings)


class NodeInterfaceBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's start of the process group, over the interface of each node's address in Ray."""

    def on_start(self, worker_group: Any, backend_config: NodeInterfaceConfig) -> None:
        worker_group.execute(interfaces.select_node_interface)
        # without a usable GPU there is no process group; the worker says so in a sentence and ends the run
        if not backend_config.gpus or all(worker_group.execute(accelerator.is_usable)):
            super().on_start(_FirstWorkerListens(worker_group), backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: NodeInterfaceConfig) -> None:
        """Do nothing: a worker leaves its process group itself, when its training ends."""


@dataclass
class NodeInterfaceConfig(TorchConfig):
    """Ray's settings of the process group, started by `NodeInterfaceBackend`.

    With GPUs, collectives of Python objects run on gloo: they never wait for the device, nor for NCCL's timeout.
    """

    gpus: bool = False

    def __post_init__(self) -> None:
        self.backend = "cpu:gloo,cuda:nccl" if self.gpus else "gloo"

    @property
    def backend_cls(self) -> type[Backend]:
        return NodeInterfaceBackend


class SkipDrainingNodes(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray Train's elastic policy, restricted to nodes that respond and are not draining.

    The answer of Ray's coordinator may be seconds old, and it counts draining nodes. Workers that already run on a
    draining node stay there as long as it lives. A new node, and one that has lost its worker, count once a process
    there is ready: the others train meanwhile, if they are enough.
    """

    def __init__(self, scaling_config: ScalingConfig, liveness: NodeLiveness) -> None:
        super().__init__(scaling_config)
        self.liveness = liveness
        self.pool: WorkerPool | None = None
        self._in_use: set[str] = set()
        """Nodes of the group that trains."""
        self._workers = 0
        """Its size."""
        self._looked = self._loading_since = 0.0
        """When new nodes were last looked for, and since when processes load on nodes; `time.monotonic()`."""
        self._patient = scaling_config
        self._eager = replace(scaling_config, elastic_resize_monitor_interval_s=_UNPREPARED_POLL_SECONDS)  # type: ignore[call-arg]

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._in_use, self._workers = set(), 0
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._in_use = {worker.metadata.node_id for worker in worker_group_state.workers}
        self._workers = worker_group_state.num_workers
        self.scaling_config = self._eager if self.liveness.unprepared else self._patient
        if self._workers < self.scaling_config.max_workers:  # type: ignore[attr-defined]
            self._prepare_new_nodes()
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _prepare_new_nodes(self) -> None:
        """Start processes on nodes that a larger group can have, so that they are ready when it is due."""
        if self.pool is None or time.monotonic() < self._looked + _UNPREPARED_POLL_SECONDS:
            return
        self._looked = time.monotonic()
        with contextlib.suppress(RayError):
            reserved = super()._get_reserved_resources() or {}
            self.pool.prepare((schedulable_nodes().keys() & reserved.keys()) - self._in_use - self.liveness.silent)

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        self.liveness.check()
        reserved: dict[str, dict[str, float]] | None = super()._get_reserved_resources()
        if reserved is None:
            return None
        if self._in_use & self.liveness.silent:  # a worker is about to be declared lost, or responds again soon
            self._latest_monitor_time = -math.inf
            return None
        try:
            usable = (schedulable_nodes().keys() - self.liveness.silent) | self._in_use
            return self._on_prepared_nodes({node: has for node, has in reserved.items() if node in usable})
        except RayError:  # the next poll may succeed
            return None

    def _on_prepared_nodes(self, reserved: dict[str, dict[str, float]]) -> dict[str, dict[str, float]] | None:
        """Leave out the nodes on which processes load, unless the others are too few.

        While a group trains, return None as long as more nodes may soon be ready: one resize costs less than two.
        """
        before, self.liveness.unprepared = self.liveness.unprepared, set()
        if self.pool is None or not self.pool.has_trained or not (self._in_use or self.pool.keeps_processes):
            return reserved
        unprepared = self.pool.unprepared(reserved.keys() - self._in_use)
        others = {node: has for node, has in reserved.items() if node not in unprepared}
        count, now = self._count_possible_workers(others), time.monotonic()
        if not self._in_use:
            enough = max(self.scaling_config.min_workers, _LEAST_SHARE * self._count_possible_workers(reserved))  # type: ignore[attr-defined]
            if count < enough:
                return reserved
        if unprepared and not before:
            self._loading_since = now
        self.liveness.unprepared = unprepared
        if unprepared and not self._in_use:
            logger.info(
                "no process is ready on %d of %d nodes: continuing without them", len(unprepared), len(reserved)
            )
        if self._in_use and unprepared:
            interval = self._patient.elastic_resize_monitor_interval_s  # type: ignore[attr-defined]
            if count <= self._workers or now < self._loading_since + interval:
                return None
        return others


class FixedLocalScaling(FixedScalingPolicy):  # type: ignore[misc]
    """A fixed number of workers on a cluster of their own: no resources are requested from an autoscaler."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _NoSynchronizationActor:
    """In place of Ray Train's actor through which workers agree on what they report: ours report nothing to Ray.

    Ray Train starts one for every group, and its process imports torch while the workers need the cores.
    """

    @classmethod
    def options(cls, **options: Any) -> type[_NoSynchronizationActor]:
        return cls

    @classmethod
    def remote(cls, **settings: Any) -> _NoSynchronizationActor:
        return cls()

    def kill(self) -> None:
        """Do nothing: there is no process."""


def _leave_out_synchronization_actor() -> None:
    vars(sys.modules[WorkerGroup.__module__])["SynchronizationActor"] = _NoSynchronizationActor
    vars(sys.modules[WorkerGroupState.__module__])["_shutdown_sync_actor"] = _NoSynchronizationActor.kill


class PooledWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """Worker group whose processes come from the `WorkerPool` among its callbacks, and `WorkerHealth` checks them."""

    def _start(self) -> None:
        """Start as Ray Train does, which forgets the placement group if a worker is lost once all have been created."""
        try:
            super()._start()
        except BaseException:
            if self.has_started():
                end_group(self)
            raise

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
        """Also limit the wait for it: a run with a range of workers decides its size again after that time."""
        if scaling_config.min_workers < scaling_config.max_workers:
            pool = next(callback for callback in self._callbacks if isinstance(callback, WorkerPool))
            seconds = _PLACEMENT_SECONDS * 2**pool.starts_in_a_row
            self._worker_group_start_timeout_s: float = min(self._worker_group_start_timeout_s, seconds)
        return super()._create_placement_group(scaling_config, worker_group_context)

    def _poll_workers_and_collect_errors(self, timeout: float | None) -> list[Any]:
        health = next(callback for callback in self._callbacks if isinstance(callback, WorkerHealth))
        self._worker_health_check_timeout_s = health.limit_seconds
        statuses: list[Any] = super()._poll_workers_and_collect_errors(timeout)
        started = {rank: poll.start_time for rank, poll in self._world_rank_to_ongoing_poll.items()}
        health.check(self.get_workers(), statuses, started)
        return statuses

    def _create_workers(
        self,
        num_workers: int,
        placement_group: Any,
        resources_per_worker: dict[str, float],
        placement_group_bundle_indices: list[int] | None = None,
        starting_world_rank: int = 0,
        world_size: int | None = None,
        replica_group_size: int | None = None,
    ) -> list[Any]:
        pool = next(callback for callback in self._callbacks if isinstance(callback, WorkerPool))
        indices = placement_group_bundle_indices or list(range(num_workers))
        try:
            processes, metadata = pool.take(placement_group, indices, resources_per_worker.get("GPU", 0))
        except RayError as error:
            raise WorkerGroupStartupFailedError(f"a worker process has ended at its start: {error}") from error
        workers = [
            Worker(process, facts, resources_per_worker, placement_group_bundle_index=index)
            for process, facts, index in zip(processes, metadata, indices, strict=True)
        ]
        ranked: list[Any] = self._assign_worker_ranks(workers, starting_world_rank, world_size, replica_group_size)
        return ranked

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        """Do as Ray Train does, without its actors for what workers report: nothing."""
        common = {
            "train_run_context": self._train_run_context,
            "synchronization_actor": None,
            "storage_context": self._storage_context,
            "worker_callbacks": self._worker_callbacks_to_propagate,
            "controller_actor": None,
        }
        calls = []
        for rank, worker in enumerate(workers):
            own = {name: values[rank] for name, values in train_context_args.items()}
            context = worker.distributed_context
            calls.append(worker.actor.init_train_context.remote(distributed_context=context, **common, **own))
        ray.get(calls)


def end_group(group: Any) -> None:
    """End a worker group: its processes go back to the pool; if that fails, they are killed."""
    try:
        group.shutdown()
    except RayError as error:
        logger.warning("the workers did not end in an orderly way: %s", error)
        group.abort()


class InProcessController(TrainController):  # type: ignore[misc]
    """Controller in the driver's process; its groups and scaling policy share the `WorkerPool` and `NodeLiveness`."""

    worker_group_cls = PooledWorkerGroup

    def __init__(self, *args: Any, scaling_policy: Any, callbacks: list[Any], **settings: Any) -> None:
        if isinstance(scaling_policy, SkipDrainingNodes):
            scaling_policy.pool = next(callback for callback in callbacks if isinstance(callback, WorkerPool))
            scaling_policy.liveness = next(each.liveness for each in callbacks if isinstance(each, CheckNodes))
        super().__init__(*args, scaling_policy=scaling_policy, callbacks=callbacks, **settings)

    def _make_and_handle_scaling_decision_for_non_running_worker_group(self, controller_state: Any) -> Any:
        """End the old group before the size of the next one is decided: its healthy processes count."""
        if self._worker_group is not None:
            end_group(self._worker_group)
            self._worker_group: Any = None
        return super()._make_and_handle_scaling_decision_for_non_running_worker_group(controller_state)


class RayTrainer(TorchTrainer):
    """Ray's trainer with `SkipDrainingNodes` for elastic runs, and without actors that have nothing to do.

    Each such actor takes seconds to start: the one that serves Ray datasets, the one that controls the workers, which
    end with the driver's process in any case, the one that removes the placement groups of a dead controller, the one
    of `_NoSynchronizationActor` and, on a cluster that ends with the run, the one that reserves its nodes.
    """

    def __init__(self, *args: Any, liveness: NodeLiveness, own_cluster: bool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._liveness, self._own_cluster = liveness, own_cluster

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if isinstance(settings["scaling_policy"], ElasticScalingPolicy):
            settings["scaling_policy"] = SkipDrainingNodes(self.scaling_config, self._liveness)
        elif self._own_cluster:
            settings["scaling_policy"] = FixedLocalScaling(self.scaling_config)
        # workers receive the context with its callbacks; used callbacks hold threads, so we pass unused copies
        settings["train_run_context"] = copy.deepcopy(settings["train_run_context"])
        _leave_out_synchronization_actor()
        controller = InProcessController(**settings)
        asyncio.run(controller.run())
        return controller.get_result()

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, idle)]  # type: ignore[misc]
