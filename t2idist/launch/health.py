"""How soon a worker that does not respond is declared lost."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2idist.config import ClusterConfig
from t2idist.launch.ray_internals import WorkerGroupCallback, WorkerHealthCheckTimeoutError, WorkerStatus
from t2idist.launch.resources import NodeLiveness

_STEPS = 20
_LEAST_SHARE = 0.5
"""Of `dead_seconds`: a worker that holds Python's lock for a while is not lost."""
_SILENT_SHARE = 0.2
"""Of `dead_seconds`: if no other process of the worker's node responds either."""


# ------------------------------------------------------------ in a worker's process
class StepClock:
    """Measures how long the steps of a worker take."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._seconds: deque[float] = deque(maxlen=_STEPS)

    def pause(self) -> None:
        """Do not count the time until the next step."""
        self._last = None

    def tick(self) -> None:
        """Note the end of a step."""
        now = time.monotonic()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    def median(self) -> float | None:
        """Return the median of the last 20 steps; None before there are as many."""
        return statistics.median(self._seconds) if len(self._seconds) == _STEPS else None


@dataclass
class StepStatus(WorkerStatus):  # type: ignore[misc]
    """Ray Train's status of a worker, and how long its steps take."""

    step_seconds: float | None = None


# ------------------------------------------------------------ in the driver or controller
class WorkerHealth(WorkerGroupCallback):  # type: ignore[misc]
    """Decides when a worker that does not respond is lost.

    It is after `cluster.dead_after_seconds`. If that is null, it is after 20 steps, but at least 5 s and at most 10 s
    (with GPUs 15 s and 30 s); and after a fifth of the latter if no other process of its node responds either.
    """

    def __init__(self, cluster: ClusterConfig, liveness: NodeLiveness) -> None:
        self._longest = cluster.dead_seconds
        self._is_fixed = cluster.dead_after_seconds is not None
        self._liveness = liveness
        self.limit_seconds = self._longest
        """Of this group, as long as other processes of the node respond."""

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self.limit_seconds = self._longest

    def check(self, workers: Sequence[Any], statuses: Sequence[Any], started: Mapping[int, float]) -> None:
        """Set the limit by the steps of the workers that responded; declare those on silent nodes lost.

        Args:
            statuses: Of the workers, by rank.
            started: When the polls began to which no response has come, by rank, as `time.monotonic()`.
        """
        if self._is_fixed:
            return
        steps = [status.step_seconds for status in statuses if getattr(status, "step_seconds", None)]
        if steps:
            self.limit_seconds = min(self._longest, max(_LEAST_SHARE * self._longest, _STEPS * max(steps)))
        latest = time.monotonic() - _SILENT_SHARE * self._longest
        waiting = [rank for rank, since in started.items() if since < latest and statuses[rank].error is None]
        silent = self._liveness.ping() if waiting else set()
        for rank in waiting:
            node = workers[rank].metadata
            if node.node_id in silent:
                statuses[rank].error = WorkerHealthCheckTimeoutError(f"no process on {node.node_ip} responds")
