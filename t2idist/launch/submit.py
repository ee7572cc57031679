"""Ray Train: how a run gets its workers."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import tempfile
import threading
import time
import uuid
from typing import Any

import torch
from ray.exceptions import RayError
from ray.train import (
    FailureConfig,
    LoggingConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
    get_preemption_info,
)
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, get_device

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.config.strict import from_dict, to_dict
from t2idist.engine.metrics import PROGRESS
from t2idist.engine.preemption import PreemptionNotice, StopRequested
from t2idist.launch import callbacks, connection, pause, ray_trainer
from t2idist.launch.replica_store import RayReplicaStore
from t2idist.observability import logs
from t2idist.observability.environment import GIT
from t2idist.observability.logs import LogContext
from t2idist.observability.progress import ProgressPrinter
from t2idist.observability.prometheus import Gauges
from t2idist.training import stages
from t2idist.training.lifecycle import OnProgress, clear_fatal, read_fatal
from t2idist.training.options import StopAfter

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0


def submit(config: RunConfig, stop: StopAfter | None, watch: OnProgress, own: bool) -> None:
    """The run on the workers of a Ray cluster.

    stop: where it is to end before it is done. watch: gets the progress messages. own: the cluster is there for this
    run alone (`connect.started`); else the run joins one.
    Raises ValueError for a cluster that cannot hold the smallest number of workers, RuntimeError where the run failed.
    """
    clear_fatal(config)
    around = contextlib.nullcontext() if own else connection.join_cluster(config.cluster)
    with around, tempfile.TemporaryDirectory(prefix="t2idist-train-", ignore_cleanup_errors=True) as folder:
        _wait_for_room(config, 0.0 if own else config.cluster.wait_seconds)
        _fit(config, folder, own, stop, watch)


def _fit(config: RunConfig, folder: str, own: bool, stop: StopAfter | None, watch: OnProgress) -> None:
    """Run the trainer to its end, again where Ray's controller failed, which its own counters do not cover.

    Raises `StopRequested` where the workers were asked to leave.
    """
    leaving, left = callbacks.StopOnSigterm(), None
    keepers, others = RayReplicaStore(_run_id(config)), ray_trainer.own_placement_groups()
    with _Progress(config, watch), ray_trainer.Reservation(stages.run_url(config), config.cluster) as reservation:
        for retry in range(config.cluster.max_failures + 1):
            try:
                trainer = _trainer(config, folder, own, stop, leaving)
                reservation.hold(f"train-{trainer.train_run_context.run_id}")  # type: ignore[attr-defined]
                with leaving.on_sigterm() if own and connection.in_main_thread() else contextlib.nullcontext():
                    left = trainer.fit().return_value  # type: ignore[attr-defined]
                break
            except WorkerGroupError as error:
                raise RuntimeError(f"the run failed: {_cause(error)}") from None
            except (TrainingFailedError, RayError) as error:
                if retry == config.cluster.max_failures:
                    raise RuntimeError(f"the run failed: {_cause(error)}") from None
                logger.warning("Ray Train's controller failed (%s); the run is taken up again", _cause(error))
                ray_trainer.remove_placement_groups(ray_trainer.own_placement_groups() - others)
    keepers.end()
    fatal = read_fatal(config)
    if fatal is not None:
        raise RuntimeError(f"the run failed: {fatal}")
    if left is not None:
        raise StopRequested(left)


def _wait_for_room(config: RunConfig, wait_seconds: float) -> None:
    """Until the smallest world fits onto the cluster's machines. Raises ValueError where it does not in that time."""
    cluster = config.cluster
    each, smallest = {"CPU": cluster.cpus_per_worker, "GPU": float(cluster.gpus_per_worker)}, cluster.workers[0]
    wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in ray_trainer.nonzero(each).items())
    if ray_trainer.worker_slots(each) >= smallest:
        return
    if wait_seconds:
        logger.info("waiting %.0f s at most for room for %d workers of %s", wait_seconds, smallest, wanted)
    deadline = time.monotonic() + wait_seconds
    with ray_trainer.request_workers(each, smallest):
        while ray_trainer.worker_slots(each) < smallest:
            if time.monotonic() >= deadline:
                machines = ray_trainer.schedulable_nodes().values()
                has = " and ".join(f"{sum(m.get(kind, 0.0) for m in machines):g} {kind}" for kind in each)
                raise ValueError(
                    f"cluster.workers: {smallest} workers of {wanted} each; the cluster has {has}, on "
                    f"{len(machines)} machine{'s' * (len(machines) != 1)}, which hold {ray_trainer.worker_slots(each)} of them"
                )
            time.sleep(_LOOK_SECONDS)


def _trainer(
    config: RunConfig, folder: str, own: bool, stop: StopAfter | None, leaving: callbacks.StopOnSigterm
) -> ray_trainer.RayTrainer:
    """Ray's trainer, of a cluster that is this run's `own` or of another.

    `folder` takes its notes of this attempt. The run's state is in our checkpoints, not there.
    """
    cluster = config.cluster
    smallest, largest = cluster.workers
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = float(cluster.gpus_per_worker)
    known = ray_trainer.NodeLiveness(RayReplicaStore(_run_id(config)), cluster.start_within_seconds)
    return ray_trainer.RayTrainer(
        _work,
        train_loop_config={"config": to_dict(config), "run_id": _run_id(config), "stop": stop and to_dict(stop)},
        scaling_config=ScalingConfig(
            num_workers=smallest if smallest == largest else (smallest, largest),  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=cluster.grow_after_seconds,  # type: ignore[call-arg]
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(timeout_s=max(1, int(cluster.hung_after_seconds))),
        known=known,
        own_cluster=own,
        run_config=RayRunConfig(
            name=config.name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level="WARNING" if own else "INFO"),  # type: ignore[call-arg]
            callbacks=[
                ray_trainer.WaitForNodeLiveness(known),  # type: ignore[list-item]
                ray_trainer.StartTimeout(cluster.start_within_seconds),  # type: ignore[list-item]
                pause.PauseBeforeResize(cluster.start_within_seconds),  # type: ignore[list-item]
                leaving,  # type: ignore[list-item]
            ],
            worker_runtime_env={"env_vars": _environment(config)},  # type: ignore[call-arg]
        ),
    )


def _environment(config: RunConfig) -> dict[str, str]:
    told = {GIT: os.environ[GIT]} if GIT in os.environ else {}
    return {**connection.thread_settings(config.cluster), **told}


def _work(settings: dict[str, Any]) -> str | None:
    """What each Ray Train worker runs. Gives what it says where it was asked to leave."""
    from t2idist.training import worker  # the driver does without, and starts a second sooner

    config, place = from_dict(RunConfig, settings["config"]), LogContext()
    logs.configure(logging.WARNING, place if config.report.json_logs else None)
    stop = from_dict(StopAfter, settings["stop"]) if settings["stop"] else None
    if not config.cluster.gpus_per_worker:
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    keepers = RayReplicaStore(settings["run_id"])
    with pause.pause_at_exit():
        around = worker.WorkerContext(
            keepers=keepers, ask=_announced, look_seconds=_LOOK_SECONDS, stand=pause.pause, stop=stop, place=place
        )
        try:
            worker.main(config, get_device(), around)
        except StopRequested as left:
            return str(left)
    return None


def _announced() -> PreemptionNotice | None:
    """Whether the run is to end, machines are to be drained, or the number of workers changes. A collective."""
    info = get_preemption_info()
    if callbacks.stop_requested():
        return PreemptionNotice(0.0)
    if pause.pause_requested():
        return PreemptionNotice(math.inf, regroup=True)
    if info is None:
        return None
    return PreemptionNotice(math.inf if info.deadline_ms is None else max(0.1, info.deadline_ms / 1000 - time.time()))


def _run_id(config: RunConfig) -> str:
    """Tells this run folder from all others, an earlier one of the same name too."""
    where = storage.join(stages.run_url(config), stages.RUN_ID)
    if not storage.exists(where):
        storage.write_json(where, {"id": uuid.uuid4().hex})
    return str(storage.read_json(where)["id"])


def _cause(error: BaseException) -> str:
    """The last line of a failure: what a person needs first."""
    inner = getattr(error, "worker_failures", None) or {}
    causes = [str(failure) for failure in inner.values()] or [str(error)]
    lines = [line.strip() for line in causes[0].splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


class _Progress:
    """Shows the run's progress, read from storage, while the driver waits, and counts it for Prometheus."""

    def __init__(self, config: RunConfig, watch: OnProgress) -> None:
        self._where = storage.join(stages.run_url(config), PROGRESS)
        self._printer = ProgressPrinter(sys.stdout, as_json=config.report.json_logs)
        self._watch, self._gauges = watch, Gauges(config.name)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._seen: Any = self._read()
        self._told: set[str] = set()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._printer.close()

    def _read(self) -> Any:
        try:
            return storage.read_json(self._where)
        except (OSError, ValueError):
            return None

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(1.0)
            message = self._read()
            if message is not None and message != self._seen:
                self._seen = message
                for text in message.get("messages", []):
                    if text not in self._told:
                        self._told.add(text)
                        self._printer.message(text)
                self._printer.show(message)
                self._watch(message)
                self._gauges.show(message)
