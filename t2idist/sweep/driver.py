"""Run a sweep: the shared stages, then its trials on Ray Tune, with the state and the page kept up to date."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.engine.checkpoint import export
from t2idist.launch import auth, connection, resources
from t2idist.sweep import page, plan, state, trial, tune
from t2idist.sweep.plan import SweepPlan
from t2idist.sweep.points import read_points
from t2idist.sweep.state import Sweep, Trial
from t2idist.training import lock

logger = logging.getLogger(__name__)

PAGE_SECONDS = 15.0
"""The page is written at most this often, and takes at most a twentieth of the time."""
END_SECONDS = 60.0
"""How long to wait until interrupted trials of this machine have saved their state."""


def run(made: SweepPlan, concurrent: int | None) -> Sweep:
    """Run the trials of a sweep that are not done.

    Args:
        concurrent: trials at a time; None: as many as the cluster has room for.

    Raises:
        ValueError: a trial's configuration is invalid, the sweep differs from that of the same name, or the cluster
            has no room for a trial.
        RuntimeError: the shared stages failed.
    """
    with lock.only_one(replace(made.config, name=made.name, storage=made.storage)):
        sweep = state.open_sweep(made)
        state.refresh(made.storage, sweep)
        pending = pending_trials(sweep, made.options.early_stopping)
        address = auth.joined_address() or auth.cluster_address(made.config.cluster.address, os.environ)
        new = {each.number: each.values for each in pending if each.state == state.NEW}
        plan.check_trials(made, new, local=not address)
        follower = Follower(made, sweep)
        follower.write(now=True)
        try:
            if pending:
                with _cluster(made.config, address):
                    _run_on_cluster(made, sweep, pending, follower, concurrent)
        finally:
            _wait_for_ends(made, sweep)
            state.refresh(made.storage, sweep)
            follower.write(now=True)
        return sweep


def pending_trials(sweep: Sweep, early_stopping: bool) -> list[Trial]:
    """Return the trials to run, interrupted ones first; without early stopping, those that it stopped, too."""
    done = (state.FINISHED, state.STOPPED) if early_stopping else (state.FINISHED,)
    pending = [each for each in sweep.trials if each.state not in done]
    return sorted(pending, key=lambda each: (each.state == state.NEW, each.number))


@contextlib.contextmanager
def _cluster(config: RunConfig, address: str) -> Iterator[None]:
    """Join the cluster at an address, or start one on this machine."""
    warning = auth.check_cluster(address, os.environ, Path.home(), config.cluster.require_token)
    if warning:
        logger.warning(warning)
    if address:
        with connection.join_cluster(config.cluster):
            yield
        return
    os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "false")  # trials end by themselves, see trial.py
    with connection.start_local_cluster(config.cluster, lambda: None):
        yield


def _run_on_cluster(
    made: SweepPlan, sweep: Sweep, pending: list[Trial], follower: Follower, concurrent: int | None
) -> None:
    cluster = made.config.cluster
    room = resources.room(cluster) // cluster.workers[0]
    if not room:
        raise ValueError(
            f"cluster.workers: the cluster has no room for a trial of {cluster.workers[0]} workers with "
            f"{cluster.cpus_per_worker:g} CPUs and {cluster.gpus_per_worker} GPUs each"
        )
    # a trial of several workers gets its resources from Ray Train; Ray Tune reserves only a byte of memory for it
    reserved = resources.nonzero(resources.per_worker(cluster)) if _is_local(made) else {"memory": 1.0}
    if made.shared and not all(export.exists(_shared_export(made, name)) for name in made.shared):
        print(f"training what all trials share: {', '.join(made.shared)}, in {made.shared_name}", flush=True)
        tune.train_to_end(_shared_job(made, sweep), reserved)
    done = [each for each in sweep.trials if each not in pending]
    scheduler = None
    if made.options.early_stopping:
        urls = [storage.join(made.storage, made.trial_name(each.number)) for each in done]
        earlier = [read_points(url, made.stage, made.options.metric) for url in urls]
        scheduler = tune.asha(made.images, made.mode, earlier)
    jobs = {each.number: _job(made, each) for each in pending}
    tune.run_trials(jobs, reserved, min(room, concurrent or room), scheduler, TuneCallback(follower), made.mode)


def _is_local(made: SweepPlan) -> bool:
    return made.config.cluster.workers == (1, 1)


def _shared_export(made: SweepPlan, stage: str) -> str:
    return storage.join(made.storage, made.shared_name, stage, "export")


def _job(made: SweepPlan, each: Trial) -> tune.TrialJob:
    name = made.trial_name(each.number)
    url = storage.join(made.storage, name)
    exports = tuple((_shared_export(made, stage), storage.join(url, stage, "export")) for stage in made.shared)
    return _job_of(made, each, name, made.stage, exports)


def _shared_job(made: SweepPlan, sweep: Sweep) -> tune.TrialJob:
    return _job_of(made, sweep.trials[0], made.shared_name, made.shared[-1])


def _job_of(
    made: SweepPlan, each: Trial, name: str, last_stage: str, exports: tuple[tuple[str, str], ...] = ()
) -> tune.TrialJob:
    local = _is_local(made)
    arguments = [made.recipe, *made.overrides(each.values, name), *made.stop_options(last_stage)]
    if local:
        arguments.append("--local")
    environment = connection.thread_settings(made.config.cluster) if local else {}
    return tune.TrialJob(
        trial.Command(tuple(arguments), os.getcwd(), environment),
        storage.join(made.storage, name),
        made.stage,
        made.options.metric,
        made.images,
        exports,
        joins=not local,
    )


def _wait_for_ends(made: SweepPlan, sweep: Sweep) -> None:
    """Wait until the processes of interrupted trials, which save their state, have ended."""
    if not _is_local(made) or not storage.is_local(made.storage):
        return
    deadline = time.monotonic() + END_SECONDS
    for each in sweep.trials:
        folder = storage.join(made.storage, made.trial_name(each.number))
        if each.state == state.TRAINING and storage.exists(storage.join(folder, "config.yaml")):
            config = replace(made.config, name=made.trial_name(each.number), storage=made.storage)
            trial.wait_until_free(config, max(0.0, deadline - time.monotonic()))


class Follower:
    """Keeps the state, the page and the terminal up to date."""

    def __init__(self, made: SweepPlan, sweep: Sweep) -> None:
        self._made, self._sweep = made, sweep
        self._trials = {each.number: each for each in sweep.trials}
        self._next_page = 0.0

    def started(self, number: int) -> None:
        """Record that a trial trains."""
        self._trials[number].state = state.TRAINING
        self.write()

    def value(self, number: int, images: int, value: float) -> None:
        """Record a value of the metric."""
        each = self._trials[number]
        if images > each.images or each.value is None:
            each.images, each.value = images, value
            self._print(each, f"{self._sweep.metric} {value:.4g} at {images:,} images")
        self.write()

    def ended(self, number: int, outcome: int | None, error: str) -> None:
        """Record how a trial ended. `outcome`: the exit status; None: it was stopped early."""
        each = self._trials[number]
        each.state = state.STOPPED if outcome is None else state.FAILED if outcome else state.FINISHED
        each.error = error
        self._print(each, f"{each.state}{f': {error}' if error else ''}")
        self.write()

    def write(self, now: bool = False) -> None:
        """Write the state and, not too often, the page."""
        state.write(self._made.url, self._sweep)
        started = time.monotonic()
        if now or started >= self._next_page:
            page.write(self._made.storage, self._sweep)
            self._next_page = time.monotonic() + max(PAGE_SECONDS, 20 * (time.monotonic() - started))

    def _print(self, each: Trial, text: str) -> None:
        print(f"trial {each.number:04d} of {len(self._trials)}: {text}", flush=True)


class TuneCallback(tune.Callback):
    """Passes the events of Ray Tune on to a follower."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._follower.started(trial.config[tune.NUMBER])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if tune.VALUE in result:
            self._follower.value(trial.config[tune.NUMBER], result[tune.IMAGES], result[tune.VALUE])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        self._follower.ended(trial.config[tune.NUMBER], result.get(tune.OUTCOME), result.get(tune.ERROR, ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._follower.ended(trial.config[tune.NUMBER], 1, "its process of Ray was lost too often")
