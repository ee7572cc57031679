"""A worker that does not respond is lost after a time that depends on its steps and on its node."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from t2idist.config import ClusterConfig
from t2idist.launch import health, ray_internals
from t2idist.launch.health import StepClock, StepStatus, WorkerHealth


class Liveness:
    """Stands for the pings of the replica actors."""

    def __init__(self, *silent: str) -> None:
        self.silent, self.pings = set(silent), 0

    def ping(self) -> set[str]:
        self.pings += 1
        return self.silent


def status(step_seconds: float | None = None) -> StepStatus:
    return StepStatus(running=True, step_seconds=step_seconds)


def worker(node: str) -> Any:
    return SimpleNamespace(metadata=SimpleNamespace(node_id=node, node_ip=f"address of {node}"))


@pytest.mark.parametrize(
    "cluster, step_seconds, limit",
    [
        (ClusterConfig(), None, 10.0),  # not measured yet
        (ClusterConfig(), 0.01, 5.0),
        (ClusterConfig(), 0.4, 8.0),
        (ClusterConfig(), 3.0, 10.0),
        (ClusterConfig(gpus_per_worker=1), 0.1, 15.0),
        (ClusterConfig(gpus_per_worker=1), 1.0, 20.0),
        (ClusterConfig(dead_after_seconds=7.0), 0.01, 7.0),
    ],
)
def test_limit_is_twenty_steps_within_bounds(cluster: ClusterConfig, step_seconds: float | None, limit: float) -> None:
    checked = WorkerHealth(cluster, Liveness())  # type: ignore[arg-type]
    checked.check([worker("a"), worker("b")], [status(), status(step_seconds)], {})
    assert checked.limit_seconds == pytest.approx(limit)
    checked.check([worker("a")], [ray_internals.WorkerStatus(running=True)], {})
    assert checked.limit_seconds == pytest.approx(limit), "a poll without a response keeps it"
    checked.before_worker_group_start(None)
    assert checked.limit_seconds == cluster.dead_seconds


def test_worker_is_lost_sooner_if_its_node_is_silent_too() -> None:
    now = time.monotonic()
    workers, started = [worker("a"), worker("b"), worker("c")], {1: now - 3, 2: now - 3}
    statuses = [status(), status(), status()]
    checked = WorkerHealth(ClusterConfig(), Liveness("b"))  # type: ignore[arg-type]
    checked.check(workers, statuses, started)
    assert [type(each.error) for each in statuses] == [
        type(None),
        ray_internals.WorkerHealthCheckTimeoutError,
        type(None),
    ]
    assert "address of b" in str(statuses[1].error)


def test_nodes_are_pinged_only_if_a_worker_is_late_and_the_limit_is_not_the_users() -> None:
    now, liveness = time.monotonic(), Liveness("a")
    WorkerHealth(ClusterConfig(), liveness).check([worker("a")], [status()], {0: now - 1})  # type: ignore[arg-type]
    fixed = WorkerHealth(ClusterConfig(dead_after_seconds=10.0), liveness)  # type: ignore[arg-type]
    fixed.check([worker("a")], [status()], {0: now - 6})
    assert liveness.pings == 0


def test_step_clock_measures_twenty_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(health.time, "monotonic", lambda: now)
    clock = StepClock()
    for step in range(21):
        assert clock.median() is None
        clock.tick()
        now += 9.0 if step == 3 else 0.5
    assert clock.median() == 0.5
    clock.pause()
    for _ in range(21):
        now += 100.0
        clock.tick()
        clock.pause()
    assert clock.median() == 0.5, "the time between two groups is no step"
