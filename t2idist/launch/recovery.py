"""What a restart of the workers was for and how long its phases took; the new workers record it."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from ray.exceptions import RayError

from t2idist.launch.callbacks import PauseBeforeResize, call_workers
from t2idist.launch.ray_internals import ControllerCallback, WorkerGroupCallback, WorkerHealthCheckTimeoutError
from t2idist.launch.worker_pool import WorkerPool, is_lost
from t2idist.observability import process
from t2idist.observability.recovery import (
    CONTROLLER_FAILED,
    RESIZE,
    SUBMITTED_AGAIN,
    WORKER_FAILED,
    WORKER_LOST,
    WORKER_SILENT,
    Recovery,
)

_of_this_group: list[Recovery] = []


# ------------------------------------------------------------ in a worker's process
def take_recovery() -> Recovery | None:
    """Return, once, the recovery that this worker's group ends."""
    return _of_this_group.pop() if _of_this_group else None


def _set_recovery(recovery: Recovery) -> None:
    _of_this_group[:] = [recovery]


# ------------------------------------------------------------ in the driver or controller
class RecordRecovery(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Measures each restart and passes its record to the new workers.

    The first group of a submission is a restart too; `AttemptRecord` leaves it out if there was no earlier attempt.

    Args:
        pool: Knows after the end of a group whether it had lost workers.
        pause: Knows when workers stopped before a resize: the seconds of the resize count from then.
        retry: How often Ray's controller has failed in this submission.
    """

    def __init__(self, pool: WorkerPool, pause: PauseBeforeResize, retry: int) -> None:
        self._pool, self._pause = pool, pause
        self._cause = CONTROLLER_FAILED if retry else SUBMITTED_AGAIN
        """Of the restart that goes on; empty while a group trains."""
        self._noticed = self._ended = time.monotonic() - (0.0 if retry else process.seconds_since_start())

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        errors = worker_group_status.errors.values()
        if any(isinstance(error, WorkerHealthCheckTimeoutError) for error in errors):
            self._begin(WORKER_SILENT)
        elif errors:
            self._begin(WORKER_LOST if any(is_lost(error) for error in errors) else WORKER_FAILED)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        self._begin(RESIZE)

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._ended = time.monotonic()
        if self._cause == WORKER_FAILED and self._pool.had_lost_workers:  # its peers reported their errors first
            self._cause = WORKER_LOST
        if self._cause == RESIZE:
            self._noticed = max(self._noticed, self._pause.stopped)

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        self._ended = time.monotonic()

    def after_worker_group_start(self, worker_group: Any) -> None:
        seconds = {"end": self._ended - self._noticed, "start": time.monotonic() - self._ended}
        with contextlib.suppress(RayError):  # the new group has failed already
            call_workers(worker_group.get_workers(), _set_recovery, Recovery(self._cause, seconds))

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._cause = ""

    def _begin(self, cause: str) -> None:
        if not self._cause:  # a failure leads to a resize decision too, and a failure of the new group to another
            self._cause, self._noticed = cause, time.monotonic()
