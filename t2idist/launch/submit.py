"""Submit a run to Ray Train: wait for resources, start the workers, report progress, retry after failures."""

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
)
from ray.train import RunConfig as RayRunConfig
from ray.util.metrics import Gauge

from t2idist import storage
from t2idist.config import ClusterConfig, RunConfig
from t2idist.config.strict import from_dict, to_dict
from t2idist.engine.metrics import PROGRESS
from t2idist.engine.preemption import PreemptionNotice, StopRequested
from t2idist.launch import callbacks, first_group, gpu_failures, one_job, recovery, resources, shared_folders
from t2idist.launch.health import WorkerHealth
from t2idist.launch.pooled_worker import own_accelerator_ids, step_clock, train_in_group
from t2idist.launch.ray_trainer import NodeInterfaceConfig, RayTrainer
from t2idist.launch.replica_store import RayReplicaStore
from t2idist.launch.worker_pool import WorkerPool
from t2idist.observability import logs
from t2idist.observability.logs import LogContext
from t2idist.observability.progress import ProgressPrinter
from t2idist.observability.prometheus import Gauges
from t2idist.training.lifecycle import OnProgress, clear_fatal, read_fatal
from t2idist.training.options import StopAfter
from t2idist.training.stages import RUN_ID, run_url

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0


def submit(config: RunConfig, stop: StopAfter | None, on_progress: OnProgress, pool: WorkerPool | None) -> None:
    """Train the run on the workers of the Ray cluster that this process is connected to.

    Args:
        stop: the stage and number of images after which the run ends early.
        on_progress: called with every progress message.
        pool: the processes for its workers, on a cluster that the run has joined; None: the cluster was started for
            this run alone.

    Raises:
        ValueError: the cluster has no room for the smallest number of workers, or its nodes do not share the folders of
            the run.
        RunIsTaken: another job of the cluster trains the run.
        RuntimeError: the run failed.
        StopRequested: the workers were asked to stop.
    """
    own = pool is None
    with contextlib.ExitStack() as stack:
        if not own:
            stack.enter_context(one_job.only_one(config))
        folder = tempfile.TemporaryDirectory(prefix="t2idist-train-", ignore_cleanup_errors=True)
        clear_fatal(config)
        _wait_for_resources(config, 0.0 if own else config.cluster.wait_seconds)
        if pool is None:
            pool = first_group.start_pool(config, own)
        else:
            first_group.start_first(pool, config.cluster)  # unless there was no room for them before
        run_id = _run_id(config)
        if not own:
            shared_folders.warn_if_uploaded(config)
            shared_folders.check(config)
        _fit(config, run_id, stack.enter_context(folder), own, stop, on_progress, pool)


def _fit(
    config: RunConfig,
    run_id: str,
    folder: str,
    own: bool,
    stop: StopAfter | None,
    on_progress: OnProgress,
    pool: WorkerPool,
) -> None:
    """Run the trainer to its end, again if Ray's controller fails, which FailureConfig does not cover."""
    on_sigterm, stopped = callbacks.StopOnSigterm(), None
    foreign_groups = resources.own_placement_groups()
    with _Progress(config, on_progress), resources.Reservation(run_url(config), config.cluster) as reservation:
        for retry in range(config.cluster.max_failures + 1):
            try:
                trainer = _trainer(config, run_id, folder, own, stop, on_sigterm, pool, retry)
                reservation.acquire(f"train-{trainer.train_run_context.run_id}")  # type: ignore[attr-defined]
                with on_sigterm.on_sigterm():
                    stopped = trainer.fit().return_value  # type: ignore[attr-defined]
                break
            except WorkerGroupError as error:
                raise RuntimeError(f"the run failed: {_cause(error)}") from None
            except (TrainingFailedError, RayError) as error:
                if retry == config.cluster.max_failures:
                    raise RuntimeError(f"the run failed: {_cause(error)}") from None
                logger.warning("Ray Train's controller failed (%s); starting it again", _cause(error))
                resources.remove_placement_groups(resources.own_placement_groups() - foreign_groups)
    RayReplicaStore(run_id).shut_down()
    fatal = read_fatal(config)
    if fatal is not None:
        raise RuntimeError(f"the run failed: {fatal}")
    if stopped is not None:
        raise StopRequested(stopped)


def _wait_for_resources(config: RunConfig, wait_seconds: float) -> None:
    """Wait until the smallest number of workers fits onto the cluster; raises ValueError after `wait_seconds`."""
    cluster = config.cluster
    per_worker, smallest = resources.per_worker(cluster), cluster.workers[0]
    needed = ", ".join(f"{amount:g} {kind}" for kind, amount in resources.nonzero(per_worker).items())
    if resources.room(cluster) >= smallest:
        return
    if wait_seconds:
        logger.info("waiting at most %.0f s for room for %d workers of %s", wait_seconds, smallest, needed)
    deadline = time.monotonic() + wait_seconds
    with resources.request_workers(per_worker, smallest):
        while resources.room(cluster) < smallest:
            if time.monotonic() >= deadline:
                nodes = resources.schedulable_nodes().values()
                total = " and ".join(f"{sum(n.get(kind, 0.0) for n in nodes):g} {kind}" for kind in per_worker)
                raise ValueError(
                    f"cluster.workers: {smallest} workers of {needed} each are needed; the cluster has {total} on "
                    f"{len(nodes)} node{'s' * (len(nodes) != 1)}, room for {resources.room(cluster)} workers"
                )
            time.sleep(_POLL_SECONDS)


def _trainer(
    config: RunConfig,
    run_id: str,
    folder: str,
    own: bool,
    stop: StopAfter | None,
    on_sigterm: callbacks.StopOnSigterm,
    pool: WorkerPool,
    retry: int,
) -> RayTrainer:
    """Build Ray's trainer. `folder` takes Ray's own notes of this attempt; the run's state is in our checkpoints."""
    cluster = config.cluster
    smallest, largest = cluster.workers
    liveness = resources.NodeLiveness(RayReplicaStore(run_id), cluster.start_seconds if smallest == largest else 0)
    pause = callbacks.PauseBeforeResize(cluster.start_seconds, liveness)
    hooks: list[Any] = [  # Ray declares another type, which has none of their methods
        recovery.RecordRecovery(pool, pause, retry),  # before those that wait
        callbacks.CheckNodes(liveness),
        callbacks.WatchDrainingNodes(),
        WorkerHealth(cluster, liveness),
        callbacks.StartTimeout(cluster.start_seconds),
        pause,
        on_sigterm,
        pool,
    ]
    return RayTrainer(
        _work,
        train_loop_config={"config": to_dict(config), "run_id": run_id, "stop": stop and to_dict(stop)},
        scaling_config=ScalingConfig(
            num_workers=smallest if smallest == largest else (smallest, largest),  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=cluster.grow_after_seconds,  # type: ignore[call-arg]
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources.nonzero(resources.per_worker(cluster)),
        ),
        torch_config=NodeInterfaceConfig(
            gpus=bool(cluster.gpus_per_worker), timeout_s=max(1, int(cluster.hung_after_seconds))
        ),
        liveness=liveness,
        own_cluster=own,
        run_config=RayRunConfig(
            name=config.name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
            callbacks=hooks,
        ),
    )


def _work(settings: dict[str, Any]) -> str | None:
    """Entry point of a Ray Train worker. Returns the stop message if the worker was asked to stop, else None."""
    from t2idist.training import worker  # not needed by the driver, which starts a second sooner without it

    config, log_context = from_dict(RunConfig, settings["config"]), LogContext()
    logs.configure(logging.WARNING, log_context if config.report.json_logs else None)
    stop = from_dict(StopAfter, settings["stop"]) if settings["stop"] else None
    if not config.cluster.gpus_per_worker:
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    with train_in_group(), callbacks.pause_at_exit():
        context = worker.WorkerContext(
            replica_store=RayReplicaStore(settings["run_id"]),
            poll_preemption=_poll,
            poll_seconds=_POLL_SECONDS,
            pause=callbacks.pause,
            recovery=recovery.take_recovery(),
            on_step=step_clock.tick,
            stop_after=stop,
            log_context=log_context,
        )
        try:
            worker.main(config, _device(config.cluster), context)
        except torch.AcceleratorError as error:
            gpu_failures.handle(error, config.cluster.workers[0])
            raise
        except StopRequested as stopped:
            return str(stopped)
        except callbacks.GroupEnded:
            return None
    return None


def _device(cluster: ClusterConfig) -> torch.device:
    """Return the device of this worker. CUDA_VISIBLE_DEVICES names those of all workers on this node."""
    if not cluster.gpus_per_worker:
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return torch.device("cuda", visible.index(own_accelerator_ids()[0]))


def _poll() -> PreemptionNotice | None:
    """Return a notice if the run is to stop, its nodes are draining, or a resize is due."""
    if callbacks.stop_requested():
        return PreemptionNotice(0.0)
    if callbacks.must_pause():
        return PreemptionNotice(math.inf, resize=True)
    seconds = callbacks.seconds_to_shutdown()
    return None if seconds is None else PreemptionNotice(seconds)


def _run_id(config: RunConfig) -> str:
    """Return the unique id of this run folder; it is drawn on the first call and stored in the folder."""
    url = storage.join(run_url(config), RUN_ID)
    stored = storage.read_json_if_present(url)
    if stored is None:
        stored = {"id": uuid.uuid4().hex}
        storage.write_json(url, stored)
    return str(stored["id"])


def _cause(error: BaseException) -> str:
    """Return the last line of a failure's text, which names the error."""
    inner = getattr(error, "worker_failures", None) or {}
    causes = [str(failure) for failure in inner.values()] or [str(error)]
    lines = [line.strip() for line in causes[0].splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


class _Progress:
    """Prints the run's progress, read from storage, while the driver waits, and exports it to Prometheus."""

    def __init__(self, config: RunConfig, on_progress: OnProgress) -> None:
        self._url = storage.join(run_url(config), PROGRESS)
        self._printer = ProgressPrinter(sys.stdout, as_json=config.report.json_logs)
        self._on_progress, self._gauges = on_progress, Gauges(config.name, Gauge)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._seen: Any = self._read()
        self._printed: set[str] = set()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._printer.close()

    def _read(self) -> Any:
        try:
            return storage.read_json(self._url)
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
                    if text not in self._printed:
                        self._printed.add(text)
                        self._printer.message(text)
                self._printer.show(message)
                self._on_progress(message)
                self._gauges.update(message)
