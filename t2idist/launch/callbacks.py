"""SIGTERM to the driver of a run that started Ray itself: its workers save and leave, and the run with them."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0

_asked = threading.Event()


def stop_requested() -> bool:
    """Whether this worker is to save and leave."""
    return _asked.is_set()


def _tell() -> None:
    """Runs in a worker's process, beside its training."""
    _asked.set()


class StopOnSigterm(WorkerGroupCallback):  # type: ignore[misc]
    """Asks the workers that train, and those that take their place, once it is told to."""

    def __init__(self) -> None:
        self._workers: list[Any] = []
        self._wanted = False

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Inside, a first SIGTERM asks the workers; a second, and one where none train, does what it did outside."""
        before: Any = signal.getsignal(signal.SIGTERM)

        def ask(number: int, frame: FrameType | None) -> None:
            if self._wanted or not self._workers:
                before(number, frame)
            self._wanted = True
            self._ask()

        signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._workers = list(worker_group.get_workers())
        if self._wanted:
            self._ask()

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._workers = []

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        self._workers = []

    def _ask(self) -> None:
        """In a thread: a signal's handler may run in the middle of one of Ray's calls."""
        threading.Thread(target=_ask, args=[list(self._workers)], name="leave", daemon=True).start()


def _ask(workers: list[Any]) -> None:
    try:
        ray.get([worker.execute_async(_tell) for worker in workers], timeout=_ANSWER_SECONDS)
    except RayError as error:  # those that take their place are asked again
        logger.warning("the workers could not be asked to leave: %s", error)
