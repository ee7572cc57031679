"""Ray Train callbacks: stop on SIGTERM, pause before a resize, draining and silent nodes, a limit for the start."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from t2idist.launch import ray_internals
from t2idist.launch.ray_internals import ControllerCallback, WorkerGroupCallback
from t2idist.launch.replica_store import ignore_nodes
from t2idist.launch.resources import NodeLiveness
from t2idist.observability.command import in_main_thread

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_RESPONSE_SECONDS = 10.0
_PAUSE_RESPONSE_SECONDS = 3.0
_SHUTDOWN_SECONDS = "5"
_DRAINING_POLL_SECONDS = 2.0

# set in a worker's process by its controller or driver, read by its training loop
_stop_requested, _pause_requested, _released = threading.Event(), threading.Event(), threading.Event()
_paused = threading.Event()
_stopped: list[float] = []
"""When this worker found that it must pause before a resize, as `time.monotonic()`. Empty: it need not."""
_shutdown_times: list[float] = []
"""When the first draining node of the group is shut down, as `time.time()`; math.inf: unknown. Empty: none drains."""


# ------------------------------------------------------------ in a worker's process
def stop_requested() -> bool:
    """Return whether this worker has been asked to save its state and exit."""
    return _stop_requested.is_set()


def must_pause() -> bool:
    """Return whether this worker has been asked to pause. Once that is so on the first worker, the group stops."""
    if _pause_requested.is_set() and not _stopped:
        _stopped.append(time.monotonic())
    return _pause_requested.is_set()


def seconds_to_shutdown() -> float | None:
    """Return the time until a node of this group is shut down, math.inf if it is unknown; None if none drains."""
    return max(0.1, _shutdown_times[0] - time.time()) if _shutdown_times else None


class GroupEnded(Exception):
    """The worker group has ended; the process serves another one."""


def pause(seconds: float) -> None:
    """Report that this worker is paused, and wait at most `seconds` for the end of its group.

    The wait ends sooner if the worker is to stop, or if the resize or the shutdown of a node is called off.

    Raises:
        GroupEnded: the group has ended.
    """
    _paused.set()
    deadline = time.monotonic() + seconds
    while not _released.wait(_POLL_SECONDS):
        called_off = not _pause_requested.is_set() and not _shutdown_times
        if called_off or _stop_requested.is_set() or time.monotonic() >= deadline:
            _pause_requested.clear()
            _paused.clear()
            _stopped.clear()
            return
    raise GroupEnded


def release() -> None:
    """End the pause of this worker: its group has ended. Called in parallel to its training."""
    _released.set()


def forget_requests() -> None:
    """Forget what this worker was asked for as a member of an earlier group."""
    for event in (_stop_requested, _pause_requested, _released, _paused):
        event.clear()
    _shutdown_times.clear()
    _stopped.clear()


@contextlib.contextmanager
def pause_at_exit() -> Iterator[None]:
    """Report this worker as paused once the block has ended."""
    try:
        yield
    finally:
        _paused.set()


def _request_stop() -> None:
    """Run in a worker's process in parallel to its training."""
    _stop_requested.set()


def _set_shutdown_time(time_or_none: float | None) -> None:
    _shutdown_times[:] = [] if time_or_none is None else [time_or_none]


def _request_pause() -> float | None:
    """Run in a worker's process in parallel to its training.

    Returns:
        For how many seconds the worker has done no step before this resize; None if it has not paused.
    """
    _pause_requested.set()
    if not _paused.is_set():
        return None
    return time.monotonic() - _stopped[0] if _stopped else 0.0


# ------------------------------------------------------------ in the driver or controller
class _RunningWorkers(WorkerGroupCallback):  # type: ignore[misc]
    """Tracks the workers that train, to call functions in their processes in parallel to the training."""

    def __init__(self) -> None:
        self._workers: list[Any] = []

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._workers = list(worker_group.get_workers())

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._workers = []

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        self._workers = []


def call_workers(
    workers: list[Any], function: Callable[..., Any], *args: Any, seconds: float = _RESPONSE_SECONDS
) -> list[Any]:
    """Call `function` in the process of every worker; raises RayError if one does not respond within `seconds`."""
    return list(ray.get([worker.execute_async(function, *args) for worker in workers], timeout=seconds))


class StopOnSigterm(_RunningWorkers):
    """Asks the running workers, and those that replace them, to save and exit once the driver receives SIGTERM."""

    def __init__(self) -> None:
        super().__init__()
        self._requested = False

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Handle SIGTERM while the block runs.

        The first SIGTERM asks the workers to stop. A second one, or one while no workers train, calls the handler that
        was set before the block.
        """
        if not in_main_thread():
            yield
            return
        previous: Any = signal.getsignal(signal.SIGTERM)

        def handle(number: int, frame: FrameType | None) -> None:
            if self._requested or not self._workers:
                previous(number, frame)
            self._requested = True
            self._request_stop()

        signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        super().after_worker_group_training_start(worker_group)
        if self._requested:
            self._request_stop()

    def _request_stop(self) -> None:
        """Use a thread: a signal handler may run in the middle of one of Ray's calls."""
        threading.Thread(target=_stop_workers, args=[list(self._workers)], name="leave", daemon=True).start()


def _stop_workers(workers: list[Any]) -> None:
    try:
        call_workers(workers, _request_stop)
    except RayError as error:  # the workers that replace them are asked again
        logger.warning("the workers could not be asked to stop: %s", error)


class PauseBeforeResize(_RunningWorkers, ControllerCallback):  # type: ignore[misc]
    """Pauses the running workers before a group of another size replaces them, waiting at most `within_seconds`.

    Ray Train ends the workers wherever they are. A paused worker has saved its state, so that no step since the last
    replica is lost.
    """

    def __init__(self, within_seconds: float, liveness: NodeLiveness) -> None:
        super().__init__()
        self._within_seconds, self._liveness = within_seconds, liveness
        self.stopped = -math.inf
        """When the workers did their last step before the last pause, as `time.monotonic()`."""

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        self._workers = []

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        if not self._workers:
            return
        deadline = time.monotonic() + self._within_seconds
        nodes = {worker.metadata.node_id for worker in self._workers}
        while time.monotonic() < deadline:
            try:
                paused = call_workers(self._workers, _request_pause, seconds=_PAUSE_RESPONSE_SECONDS)
                if None not in paused:
                    self.stopped = time.monotonic() - paused[0]  # the first worker decides for all
                    return
            except GetTimeoutError:
                if self._liveness.ping() & nodes:  # a node has just been lost; the others resume from a replica
                    return
            except RayError:  # so has a worker
                return
            time.sleep(_POLL_SECONDS)
        logger.warning("workers did not pause within %.0f s; replacing them anyway", self._within_seconds)


class WatchDrainingNodes(_RunningWorkers):
    """Tells the running workers when a node of theirs is to be shut down."""

    def __init__(self) -> None:
        super().__init__()
        self._polled = 0.0
        self._told: float | None = None

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        super().after_worker_group_training_start(worker_group)
        self._told = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if not self._workers or time.monotonic() < self._polled + _DRAINING_POLL_SECONDS:
            return
        self._polled = time.monotonic()
        nodes = {worker.metadata.node_id for worker in self._workers}
        try:
            draining = ray_internals.state.get_draining_nodes()
        except RayError:  # the head does not respond
            return
        times = [milliseconds / 1000 or math.inf for node, milliseconds in draining.items() if node in nodes]
        first = min(times, default=None)
        if first != self._told:
            self._told = first
            for worker in self._workers:
                worker.execute_async(_set_shutdown_time, first)


class CheckNodes(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Lets Ray Train start workers only when it is known which nodes respond, and not on nodes that are left out."""

    def __init__(self, liveness: NodeLiveness) -> None:
        self.liveness = liveness

    def after_controller_start(self, train_run_context: Any) -> None:
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", _SHUTDOWN_SECONDS)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        self.liveness.check()

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        left_out = sorted(self.liveness.silent | self.liveness.unprepared)
        return {ray_internals.RAY_NODE_ID_KEY: f"!in({','.join(left_out)})"} if left_out else None

    def after_worker_group_start(self, worker_group: Any) -> None:
        with contextlib.suppress(RayError):  # the new group has failed already
            call_workers(worker_group.get_workers(), ignore_nodes, self.liveness.silent)


class StartTimeout(WorkerGroupCallback):  # type: ignore[misc]
    """Ends workers that are not ready to train within `start_within_seconds`; Ray Train then starts a new group.

    Ray's own timeout covers the start of the workers' processes only; a worker that hangs right after would never end.
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
    logger.warning("workers did not start in time; starting new ones")
    for actor in actors:
        ray.kill(actor)
