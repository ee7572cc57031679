"""A cadence by the clock, for actions that all workers take after the same step."""

from __future__ import annotations

import time

from t2idist.engine.world import World


class Cadence:
    """Chooses the steps after which an action is due, about every `seconds` of the first worker's clock.

    Workers must agree without a collective after every step. So they look at the clock only after steps that were
    chosen before: the first look is where the speed of the last interval predicts the action, and each further one
    comes after at most as many steps again.

    Args:
        seconds: between two actions; 0: due after every step.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self.seconds = seconds
        self.interval = (1, 0.0)
        """Steps and seconds between the last two actions."""
        self._world = world
        self._last: tuple[int, float] | None = None
        self._next_look = 0

    def restart(self, step: int) -> None:
        """Count from this step."""
        self._last = (step, time.monotonic())
        steps, seconds = self.interval
        self._next_look = step + (max(1, round(self.seconds * steps / seconds)) if seconds else 1)

    def due(self, step: int) -> bool:
        """Return whether the action is due after a step, and count the next interval from it if so. A collective."""
        if self._last is None:
            self.restart(step - 1)
        if step < self._next_look:
            return False
        assert self._last is not None
        last, since = self._last
        elapsed = self._world.broadcast_object(time.monotonic() - since) if self.seconds else 0.0
        steps = step - last
        missing = round((self.seconds - elapsed) * steps / max(elapsed, 1e-6))
        if elapsed < self.seconds and missing > steps // 20:
            self._next_look = step + min(missing, steps)
            return False
        self.interval = (steps, elapsed)
        self.restart(step)
        return True
