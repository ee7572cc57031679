"""Which machines Ray Train counts on: its autoscaling coordinator made to look often, and to forget dead runs."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ray
from ray import PlacementGroupID
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.util.placement_group import PlacementGroup, remove_placement_group

from t2idist import storage
from t2idist.config import ClusterConfig
from t2idist.launch.replica_store import RayReplicaStore

logger = logging.getLogger(__name__)

RESERVATION = "reservation.json"
_COORDINATOR_SECONDS = 5.0
_LOOK_SECONDS = 2.0
_PING_SECONDS = 1.0
_SHUTDOWN_SECONDS = "5"


class NodeLiveness:
    """Knows which machines are left.

    One that falls silent counts as alive until Ray's health check gives it up; new workers that are started before that
    would wait for it, until they are given up too after `start_within_seconds`. Every machine that had a worker has a
    keeper: one that does not answer is waited for, until it does or Ray knows, but no longer than that.
    """

    def __init__(self, keepers: RayReplicaStore, start_within_seconds: float) -> None:
        self._keepers, self._start_within_seconds = keepers, start_within_seconds

    def wait(self) -> None:
        """Until every keeper answers or its machine is given up; Ray's coordinator then looks anew."""
        deadline = time.monotonic() + self._start_within_seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(RayError):
                if not set(self._keepers.silent_nodes(_PING_SECONDS)) & alive_nodes().keys():
                    break
            time.sleep(_PING_SECONDS / 4)
        with contextlib.suppress(ValueError, RayError):
            ray.get(_coordinator().get_reserved_resources.remote("", recompute=True), timeout=_COORDINATOR_SECONDS)


class WaitForNodeLiveness(ControllerCallback):  # type: ignore[misc]
    """Lets Ray Train start workers only when it is known which machines are left."""

    def __init__(self, known: NodeLiveness) -> None:
        self._known = known

    def after_controller_start(self, train_run_context: Any) -> None:
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", _SHUTDOWN_SECONDS)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        self._known.wait()


class SkipDrainingNodes(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray Train's own choice of the number of workers, of machines that are known to stay.

    What Ray's coordinator says may be seconds old, and it counts machines that are about to go. Workers that run on one
    stay there as long as it does.
    """

    def __init__(self, scaling_config: ScalingConfig, known: NodeLiveness) -> None:
        super().__init__(scaling_config)  # type: ignore[arg-type]
        self._known = known
        self._in_use: set[str] = set()

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._in_use = set()
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._in_use = {worker.metadata.node_id for worker in worker_group_state.workers}
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        self._known.wait()
        reserved: dict[str, dict[str, float]] | None = super()._get_reserved_resources()
        try:
            usable = schedulable_nodes().keys() | self._in_use
        except RayError:  # the next look may know
            return None
        return None if reserved is None else {node: has for node, has in reserved.items() if node in usable}


class FixedLocalScaling(FixedScalingPolicy):  # type: ignore[misc]
    """Always the same number of workers, on a cluster that is there for them alone: nobody is asked for room."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class InProcessWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """Workers of a controller that is this process, in the environment that their cluster was started with."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        """None of their own: any process that Ray has ready will do."""
        return {}

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        """As Ray Train's, but it gives workers the controller to ask for what they reported: we report nothing."""
        common = {
            "train_run_context": self._train_run_context,
            "synchronization_actor": sync_actor,
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


class InProcessController(TrainController):  # type: ignore[misc]
    """Runs in the driver, without which its workers and their cluster end in any case."""

    worker_group_cls = InProcessWorkerGroup


class RayTrainer(TorchTrainer):
    """Ray's trainer with our choice of the number of workers where it is a range, and without actors that do nothing.

    Each takes seconds to start: the one that hands out Ray's datasets, and on a cluster that ends with the run those
    that reserve machines of it, clean it up afterwards and control the workers.
    """

    def __init__(self, *args: Any, known: NodeLiveness, own_cluster: bool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._known, self._own_cluster = known, own_cluster

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if isinstance(settings["scaling_policy"], ElasticScalingPolicy):
            settings["scaling_policy"] = SkipDrainingNodes(self.scaling_config, self._known)
        elif self._own_cluster:
            settings["scaling_policy"] = FixedLocalScaling(self.scaling_config)  # type: ignore[arg-type]
        if self._own_cluster:
            # workers get the context, and in it callbacks that nobody has used: used ones hold threads
            settings["train_run_context"] = copy.deepcopy(settings["train_run_context"])
            controller = InProcessController(**settings)
            asyncio.run(controller.run())  # type: ignore[no-untyped-call]
            return controller.get_result()
        return super()._initialize_and_run_controller(**settings)  # type: ignore[misc]

    def _register_sigint_handler(self, controller: Any) -> None:
        """None: Ctrl-C ends this process, and with it the controller; Ray Train's lets it look like a failure."""

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback) if self._own_cluster else (DatasetsCallback,)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, idle)]  # type: ignore[misc]


class StartTimeout(WorkerGroupCallback):  # type: ignore[misc]
    """Ends workers that are not ready to train within so many seconds; Ray Train then starts a new group.

    Ray's own time-out ends when the workers' processes are there; one that hangs right after would never be given up.
    """

    def __init__(self, start_within_seconds: float) -> None:
        self._start_within_seconds = start_within_seconds
        self._timer: threading.Timer | None = None

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        self._cancel()
        self._timer = threading.Timer(self._start_within_seconds, _end_workers, [[worker.actor for worker in workers]])
        self._timer.daemon = True
        self._timer.start()
        return {}

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._cancel()

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._cancel()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _end_workers(actors: list[Any]) -> None:
    logger.warning("workers did not start in time; they are started anew")
    for actor in actors:
        ray.kill(actor)


def schedulable_nodes() -> dict[str, dict[str, float]]:
    """`alive_nodes` without those that are about to go: Ray starts nothing there any more."""
    leaving: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return {node: has for node, has in alive_nodes().items() if node not in leaving}


def alive_nodes() -> dict[str, dict[str, float]]:
    """The machines that Ray takes to be alive, with all that each has."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}


def worker_slots(each: Mapping[str, float]) -> int:
    """How many workers, each with all that it takes on one machine, fit onto the machines that stay."""
    takes, machines = nonzero(each).items(), schedulable_nodes().values()
    return sum(min(int(has.get(kind, 0.0) / amount + 1e-9) for kind, amount in takes) for has in machines)


def nonzero(each: Mapping[str, float]) -> dict[str, float]:
    """Of what a worker takes, by kind: that of which it takes any."""
    return {kind: amount for kind, amount in each.items() if amount > 0}


@contextlib.contextmanager
def request_workers(each: Mapping[str, float], workers: int) -> Iterator[None]:
    """Inside, Ray's autoscaler, where there is one, is asked for room for so many workers."""
    request_resources(bundles=[nonzero(each)] * workers)
    try:
        yield
    finally:
        request_resources(bundles=[])


class Reservation:
    """What Ray's autoscaling coordinator sets aside for an elastic run: it says how many workers there may be.

    It looks at the nodes every 20 s only, and keeps what a dead driver had set aside for 180 s. Here both are mended:
    it is made to look more often, and the last submission's share is given back before this one asks. A run of a fixed
    number of workers does not go by what it says.
    """

    def __init__(self, run_url: str, cluster: ClusterConfig) -> None:
        self._where = storage.join(run_url, RESERVATION)
        self._holder = ""
        self._elastic = cluster.workers[0] < cluster.workers[1]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="nodes", daemon=True)

    def __enter__(self) -> Reservation:
        if self._elastic:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._elastic:
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
        while not self._ended.wait(_LOOK_SECONDS):
            with contextlib.suppress(ValueError, RayError):
                call = _coordinator().get_reserved_resources.remote(self._holder, recompute=True)
                ray.get(call, timeout=_COORDINATOR_SECONDS)


def own_placement_groups() -> set[str]:
    """Ids of the placement groups that this job has; their last digits are the job's."""
    job = ray.get_runtime_context().get_job_id()
    try:
        table: dict[str, dict[str, Any]] = ray.util.placement_group_table()  # type: ignore[no-untyped-call]
    except RayError:
        return set()
    return {group for group, facts in table.items() if facts["state"] != "REMOVED" and group.endswith(job)}


def remove_placement_groups(groups: Iterable[str]) -> None:
    """Give back what a dead controller held: Ray keeps it where its State API, a part of the dashboard, does not run.

    Workers of the next controller would wait for the same places without end.
    """
    for group in groups:
        with contextlib.suppress(RayError):
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def _coordinator() -> Any:
    """Ray's own actor; raises ValueError where there is none."""
    return ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
