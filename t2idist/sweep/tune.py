"""Trials on Ray Tune: each is a process that trains; its metric is reported to ASHA by images seen."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune import Callback as Callback
from ray.tune.schedulers import ASHAScheduler

from t2idist.sweep.points import Point, read_points
from t2idist.sweep.trial import Command, Process, copy_export

IMAGES, VALUE, OUTCOME, ERROR, NUMBER = "images", "value", "outcome", "error", "number"
"""Keys of a result that a trial reports; OUTCOME (its exit status) and ERROR only with the last one."""
REDUCTION = 3
"""ASHA keeps the best third of the trials at each rung."""
FIRST_RUNG = 1 / 8
"""Images of the first rung, as a share of the budget."""
MAX_FAILURES = 3
"""How often Ray Tune starts a trial again whose node was lost; it resumes from its checkpoint."""
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class TrialJob:
    """A trial, or the run that trains the shared stages."""

    command: Command
    run_url: str
    stage: str
    metric: str
    images: int
    """Budget of the stage."""
    exports: tuple[tuple[str, str], ...] = ()
    """Exports of shared stages to copy: from, to."""
    joins: bool = False
    """The command submits to the cluster that this process belongs to."""


def start(job: TrialJob) -> Process:
    """Start a job's process on this node, with the exports that it needs."""
    for source, target in job.exports:
        copy_export(source, target)
    command = job.command
    if job.joins:
        address = ray.get_runtime_context().gcs_address
        command = Command(command.arguments, command.folder, {**command.environment, "RAY_ADDRESS": address})
    return Process(command)


class TrainRun(tune.Trainable):  # type: ignore[misc]
    """A trial in a worker of Ray Tune. A step lasts until the next value of the metric, or the end of the run."""

    def setup(self, config: dict[str, Any], jobs: Mapping[int, TrialJob] | None = None) -> None:
        """Start the process, which continues from the run's last checkpoint."""
        self._job, self._reported = (jobs or {})[config[NUMBER]], 0
        self._process = start(self._job)

    def step(self) -> dict[str, Any]:
        """Return the next value, or the outcome."""
        while True:
            status = self._process.poll()
            points = read_points(self._job.run_url, self._job.stage, self._job.metric)
            if len(points) > self._reported and points[self._reported][0] < self._job.images:
                self._reported += 1
                return _result(points[self._reported - 1])  # the last one comes with the outcome: too late to stop
            if status is not None:
                last = _result(points[-1]) if points else {}
                return {**last, OUTCOME: status, ERROR: self._process.error() if status else "", "done": True}
            time.sleep(_POLL_SECONDS)

    def cleanup(self) -> None:
        """End the process; it saves its state."""
        self._process.stop()


def _result(point: Point) -> dict[str, Any]:
    return {IMAGES: point[0], VALUE: point[1]}


def train_to_end(job: TrialJob, resources: Mapping[str, float]) -> None:
    """Run one job on the cluster. Raises RuntimeError if it fails."""
    remote = ray.remote(num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0), max_retries=MAX_FAILURES)(
        _train_to_end
    )
    try:
        error = ray.get(remote.remote(job))
    except RayError as failure:
        raise RuntimeError(f"the shared stages failed: {' '.join(str(failure).split())}") from None
    if error:
        raise RuntimeError(f"the shared stages failed: {error}")


def _train_to_end(job: TrialJob) -> str:
    """Return the error, "" if the run succeeds."""
    process = start(job)
    try:
        while (status := process.poll()) is None:
            time.sleep(_POLL_SECONDS)
        return process.error() if status else ""
    finally:
        process.stop()


def asha(budget_images: int, mode: str, earlier: Sequence[Sequence[Point]]) -> ASHAScheduler:
    """Build the scheduler that stops the worst two thirds of the trials at each rung.

    Args:
        budget_images: images of a whole trial, which ends by itself.
        earlier: values of trials that are done, so that a resumed sweep decides as if it had not ended.
    """
    scheduler = ASHAScheduler(
        time_attr=IMAGES,
        metric=VALUE,
        mode=mode,
        max_t=2 * budget_images,  # a trial ends by itself, with the step that reaches its budget
        grace_period=max(1, int(budget_images * FIRST_RUNG)),
        reduction_factor=REDUCTION,
    )
    for number, points in enumerate(earlier):
        trial: Any = SimpleNamespace(trial_id=f"earlier-{number}")
        controller: Any = None  # which ASHA does not use
        scheduler.on_trial_add(controller, trial)
        for point in points:
            scheduler.on_trial_result(controller, trial, _result(point))
    return scheduler


def run_trials(
    jobs: Mapping[int, TrialJob],
    resources: Mapping[str, float],
    concurrent: int,
    scheduler: ASHAScheduler | None,
    callback: Callback,
    mode: str,
) -> None:
    """Run the jobs, by number of the trial, in their order.

    Args:
        resources: of each trial.
        scheduler: stops trials early; None: all run to their end.
        callback: is told of each trial's results.
        mode: "min" or "max".
    """
    with tempfile.TemporaryDirectory(prefix="t2idist-tune-", ignore_cleanup_errors=True) as folder, _quiet():
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(TrainRun, jobs=dict(jobs)), dict(resources)),
            param_space={NUMBER: tune.grid_search(list(jobs))},
            tune_config=tune.TuneConfig(
                scheduler=scheduler,
                metric=None if scheduler else VALUE,
                mode=None if scheduler else mode,
                max_concurrent_trials=concurrent,
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                callbacks=[callback],
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the runs have their own
                verbose=0,
            ),
        )
        tuner.fit()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave Ctrl-C to the command, allow results without a value, and write none of Ray Tune's own files or tables."""
    variables = {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
