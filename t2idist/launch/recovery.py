"""What a restart of the workers was for and how long its phases took; the new workers record it."""

from __future__ import annotations

import time
from typing import Any

from ray.exceptions import RayError

from t2idist.launch.callbacks import call_workers
from t2idist.launch.ray_internals import ControllerCallback, WorkerGroupCallback, WorkerHealthCheckTimeoutError
from t2idist.launch.worker_pool import is_lost
from t2idist.observability import process
from t2idist.observability.recovery import (
    RESIZE,
    SUBMITTED_AGAIN,
    WORKER_FAILED,
    WORKER_LOST,
    WORKER_SILENT,
    Recovery,
)

_of_this_group: list[Recovery] = []


# ------------------------------------------------------------ in a worker's process
def recovery_of_this_group() -> Recovery | None:
    """Return the recovery that this worker's group ends, or None."""
    return _of_this_group[0] if _of_this_group else None


def _set_recovery(recovery: Recovery | None) -> None:
    _of_this_group[:] = [] if recovery is None else [recovery]


# ------------------------------------------------------------ in the driver or controller
class RecordRecovery(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Measures each restart and tells the new workers.

    Args:
        of_submission: The first group is that of the submission; it ends a recovery if there was an earlier submission.
    """

    def __init__(self, of_submission: bool) -> None:
        self._of_submission = of_submission
        self._cause = ""
        self._noticed = self._ended = 0.0

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

    def after_worker_group_start(self, worker_group: Any) -> None:
        recovery = None
        if self._of_submission:
            recovery = Recovery(SUBMITTED_AGAIN, {"start": process.seconds_since_start()})
        elif self._ended:  # it is not the first group
            seconds = {"end": self._ended - self._noticed, "start": time.monotonic() - self._ended}
            recovery = Recovery(self._cause, seconds)
        try:
            call_workers(worker_group.get_workers(), _set_recovery, recovery)
        except RayError:  # the new group has failed already
            return
        self._cause, self._of_submission = "", False

    def _begin(self, cause: str) -> None:
        if not self._cause:  # a failure leads to a resize decision too, and a failure of the new group to another
            self._cause, self._noticed = cause, time.monotonic()
