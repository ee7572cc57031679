"""Workers that Ray Train is about to replace, as a machine came back, stand still first, their state kept.

Ray Train ends such workers wherever they are. Here its controller asks each, inside its process, to stand still, and
waits until all do: what they did since the last copy of their state is not lost.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

logger = logging.getLogger(__name__)

_STAND_SECONDS = 60.0
_ASK_SECONDS = 0.25
_ANSWER_SECONDS = 10.0

_asked, _still = threading.Event(), threading.Event()


def pause_requested() -> bool:
    """Whether this worker is to stand still."""
    return _asked.is_set()


def pause() -> None:
    """Tell the controller that this worker stands still, and wait for the end of this process, a minute at most."""
    _still.set()
    time.sleep(_STAND_SECONDS)
    _asked.clear()
    _still.clear()


@contextlib.contextmanager
def pause_at_exit() -> Iterator[None]:
    """A worker that has done its work stands still."""
    try:
        yield
    finally:
        _still.set()


def _is_still() -> bool:
    """Runs in a worker's process, beside its training."""
    _asked.set()
    return _still.is_set()


class PauseBeforeResize(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Makes running workers stand still before a new group takes their place, `within_seconds` at most."""

    def __init__(self, within_seconds: float) -> None:
        self._within_seconds = within_seconds
        self._workers: list[Any] = []

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._workers = list(worker_group.get_workers())

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._workers = []

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        self._workers = []

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        self._workers = []

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        if not self._workers:
            return
        deadline = time.monotonic() + self._within_seconds
        try:
            while not all(self._answers()):
                if time.monotonic() > deadline:
                    logger.warning(
                        "workers did not stand still in %.0f s; they are replaced all the same", self._within_seconds
                    )
                    return
                time.sleep(_ASK_SECONDS)
        except RayError:  # one has just died; the new group goes on from an earlier copy
            return

    def _answers(self) -> list[bool]:
        return list(ray.get([worker.execute_async(_is_still) for worker in self._workers], timeout=_ANSWER_SECONDS))
