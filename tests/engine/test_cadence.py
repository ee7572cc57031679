"""Cadences by the clock: few comparisons, the same steps on all workers."""

from __future__ import annotations

import time

import pytest

from t2idist.engine import cadence
from t2idist.engine.cadence import Cadence
from t2idist.engine.world import World
from tests.engine.test_trainer import SINGLE_WORKER
from tests.helpers.worker_processes import Workers


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.looks = 0

    def monotonic(self) -> float:
        self.looks += 1
        return self.seconds


def due_steps(clock: Clock, durations: list[float], seconds: float) -> list[int]:
    result, tested = [], Cadence(SINGLE_WORKER, seconds)
    tested.restart(0)
    for step, duration in enumerate(durations, start=1):
        clock.seconds += duration
        if tested.due(step):
            result.append(step)
    return result


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    result = Clock()
    monkeypatch.setattr(cadence, "time", result)
    return result


def test_actions_follow_the_clock_and_look_at_it_rarely(clock: Clock) -> None:
    assert due_steps(clock, [0.01] * 1000, 2.0) == [200, 400, 600, 800, 1000]
    assert clock.looks < 30


def test_slow_first_steps_do_not_mislead(clock: Clock) -> None:
    steps = due_steps(clock, [0.5, 0.5, *[0.01] * 600], 2.0)
    assert steps[0] <= 102 and steps[1] - steps[0] in range(190, 210)


def test_steps_that_are_longer_than_the_cadence_are_all_due(clock: Clock) -> None:
    assert due_steps(clock, [3.0] * 4, 2.0) == [1, 2, 3, 4]
    assert due_steps(clock, [0.0] * 4, 0.0) == [1, 2, 3, 4]


def test_steps_that_become_slower_are_followed(clock: Clock) -> None:
    steps = due_steps(clock, [0.01] * 200 + [1.0] * 206, 2.0)
    assert steps[0] == 200 and steps[1] <= 400 and steps[2] - steps[1] <= 3


def of_own_clock(world: World) -> list[int]:
    tested, result = Cadence(world, 0.05), []
    for step in range(1, 101):
        time.sleep(0.001 * (1 + world.rank))
        if tested.due(step):
            result.append(step)
    return result


def test_workers_agree(workers: Workers) -> None:
    one, two = workers.run(2, of_own_clock)
    assert one == two and len(one) >= 2
