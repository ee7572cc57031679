"""Announced interruptions: SIGTERM to this process, a node that the cloud reclaims, a resize of the worker group.

The state is saved before the interruption.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from t2idist.engine.cadence import Cadence
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 5.0
_GRACE_SECONDS = 60.0

Poll = Callable[[], "PreemptionNotice | None"]
"""Returns the current notice, the same on all workers. A collective if there are several workers."""


@dataclass(frozen=True)
class PreemptionNotice:
    """An announced interruption."""

    seconds_left: float
    """Until a node of the run is shut down; math.inf if unknown; 0 if this process is to end now."""
    resize: bool = False
    """Whether more or fewer workers replace the current ones as soon as these pause."""


class StateSaver(Protocol):
    """Saves the state of a stage."""

    def save(self) -> None:
        """Begin a checkpoint, after the records of the steps that it includes are stored."""
        ...

    def finish(self) -> None:
        """Wait until the checkpoint is committed."""
        ...

    def replicate_or_save(self) -> None:
        """Copy the state to replicas or, if that is not possible, save a checkpoint; wait until that is done."""
        ...


class StopRequested(Exception):
    """The run stopped on request; its state is saved."""


class PreemptionHandler:
    """Reacts to preemption notices during a stage.

    Args:
        poll: None if there is no source of notices.
        poll_seconds: approximate time between two polls; 0 polls after every step.
        pause: called with seconds, before a resize and before a node is shut down: reports that this worker is ready
            to be replaced, and blocks for at most these seconds. None: it sleeps; no notice announces a resize then.
    """

    def __init__(
        self, poll: Poll | None, poll_seconds: float, world: World, pause: Callable[[float], None] | None = None
    ) -> None:
        self._poll, self._world, self._pause = poll, world, pause
        self._cadence = Cadence(world, poll_seconds)
        self._saved = self._saved_last = False

    def check(self, trainer: Trainer, state: StateSaver) -> None:
        """Poll for a notice after a step, if it is time, and react to it. A collective.

        After the first notice the state is saved and training continues. Shortly before the node is shut down the state
        is saved again and training waits for the shutdown, so that no step is lost; it continues if the node stays.
        Before a resize the state is copied to replicas and the worker pauses.

        Raises:
            StopRequested: this process is to end; the state is saved.
        """
        if self._poll is None or not self._cadence.due(trainer.step):
            return
        notice = self._world.broadcast_object(self._poll())
        if notice is None:
            self._saved = self._saved_last = False
            return
        if notice.resize:
            assert self._pause is not None
            state.replicate_or_save()
            self._pause(_GRACE_SECONDS)
            return
        if notice.seconds_left == 0:
            state.save()
            state.finish()
            raise StopRequested(f"saved at {trainer.images} images")
        if not self._saved and self._world.is_main:
            logger.warning("a node of this run will be shut down%s; saving", _time_left(notice.seconds_left))
        began = time.monotonic()
        # with less, this poll may be too early for the last save and the next one too late
        wait_seconds = max(_WAIT_SECONDS, 2 * self._cadence.interval[1])
        if notice.seconds_left <= wait_seconds and not self._saved_last:
            self._saved_last = True
            state.save()
            state.finish()
            wait = self._pause or time.sleep
            wait(max(0.0, notice.seconds_left + _GRACE_SECONDS - (time.monotonic() - began)))
        elif not self._saved:
            state.save()
        self._saved = True


def _time_left(seconds: float) -> str:
    return f" in {seconds:.0f} s" if 0 < seconds < math.inf else ""
