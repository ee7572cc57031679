"""Announced ends: a signal to this process, a machine that a cloud takes back, new workers in place of these.

What is not saved then is saved.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World

logger = logging.getLogger(__name__)

_HOLD_SECONDS = 5.0
_GRACE_SECONDS = 60.0

Poll = Callable[[], "PreemptionNotice | None"]
"""Gives what is announced, the same on all workers; a collective where there are several."""


@dataclass(frozen=True)
class PreemptionNotice:
    """seconds_left: until a machine of the run goes (math.inf: nobody said); 0: this process is to end now.

    regroup: new workers, more or fewer, are to take the place of these as soon as they stand still.
    """

    seconds_left: float
    regroup: bool = False


class StateSaver(Protocol):
    """Where the state of a stage goes."""

    def save(self) -> None:
        """Begin a checkpoint; the steps that it counts as done are on record before."""
        ...

    def finish(self) -> None:
        """Wait until it is written."""
        ...

    def keep(self) -> None:
        """Keep the state where other workers find it, in memory or in storage, and wait until that is done."""
        ...


class StopRequested(Exception):
    """The run ended because it was asked to; its state is saved."""


class PreemptionHandler:
    """What a stage does about notices.

    ask: None where nobody could give one. look_seconds: about how often to ask (0: after every step). stand: tells that
    this worker stands still and waits for its end, or, if that does not come, until `ask` says so no more.
    """

    def __init__(
        self, ask: Poll | None, look_seconds: float, world: World, stand: Callable[[], None] | None = None
    ) -> None:
        self._ask, self._look_seconds, self._world, self._stand = ask, look_seconds, world, stand
        self._every_steps, self._hold_seconds = 1, _HOLD_SECONDS
        self._heard = self._held = False
        self._looked_step: int | None = None

    def pace(self, step_seconds: float) -> None:
        """Set how often to look, from what a step takes; all workers give the same."""
        self._every_steps = max(1, round(self._look_seconds / max(step_seconds, 1e-6)))
        self._hold_seconds = max(_HOLD_SECONDS, 2 * self._every_steps * step_seconds)  # else the last look is too early

    def check(self, trainer: Trainer, state: StateSaver) -> None:
        """Look for a notice after a step, where it is time. A collective.

        At the first one the state is saved, and training goes on; shortly before the machine goes it is saved again and
        training waits for that, so that no step is lost; if it does not go after all, training goes on. Where the
        workers are to be replaced, the state is kept and they wait for that. Raises `StopRequested` where this process itself is
        to end.
        """
        if self._looked_step is None:
            self._looked_step = trainer.step - 1
        if self._ask is None or trainer.step - self._looked_step < self._every_steps:
            return
        self._looked_step = trainer.step
        notice = self._world.broadcast_object(self._ask())
        if notice is None:
            self._heard = self._held = False
            return
        if notice.regroup:
            assert self._stand is not None
            state.keep()
            self._stand()
            return
        if not self._heard and self._world.is_main:
            logger.warning("a machine of this run is about to go%s; saving", _time_left(notice.seconds_left))
        began = time.monotonic()
        if notice.seconds_left <= self._hold_seconds and not self._held:
            self._held = True
            state.save()
            state.finish()
            if notice.seconds_left == 0:
                raise StopRequested(f"saved at {trainer.images} images")
            time.sleep(max(0.0, notice.seconds_left + _GRACE_SECONDS - (time.monotonic() - began)))
        elif not self._heard:
            state.save()
        self._heard = True


def _time_left(seconds_left: float) -> str:
    return f" in {seconds_left:.0f} s" if 0 < seconds_left < math.inf else ""
