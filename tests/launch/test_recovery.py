"""The record of each restart: its cause and the seconds of its phases, whatever the order of Ray Train's calls."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from t2idist import storage
from t2idist.launch import ray_internals, recovery
from t2idist.launch.recovery import RecordRecovery
from t2idist.observability.recovery import Recovery
from t2idist.training.attempts import ATTEMPTS, AttemptRecord

LOST = ray_internals.WorkerHealthCheckFailedError("ended", RuntimeError())
SILENT = ray_internals.WorkerHealthCheckTimeoutError("silent")
RAISED = RuntimeError("Connection closed by peer")


class Run:
    """Calls `RecordRecovery` as Ray Train does; each call takes a second of a made-up clock, a poll with errors too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, retry: int = 0) -> None:
        self.now = 1000.0
        self.passed: list[Recovery] = []
        self.responds = True
        self.pool: Any = SimpleNamespace(had_lost_workers=False)
        monkeypatch.setattr(recovery, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(recovery.process, "seconds_since_start", lambda: 7.0)
        monkeypatch.setattr(recovery, "call_workers", self._call)
        self.pause: Any = SimpleNamespace(stopped=-math.inf)
        self.record = RecordRecovery(self.pool, self.pause, retry)

    def _call(self, workers: list[Any], function: object, sent: Recovery) -> None:
        if not self.responds:
            raise GetTimeoutError
        self.passed.append(sent)

    def _then(self, name: str, *args: Any) -> None:
        getattr(self.record, name)(*args)
        self.now += 1.0

    def start(self, trains: bool = True) -> dict[str, Any]:
        """Start a group; return what its workers record."""
        group = SimpleNamespace(get_workers=list)
        self._then("before_controller_execute_resize_decision", None)
        self._then("after_worker_group_start", group)
        if trains:
            self._then("after_worker_group_training_start", group)
        return self.passed[-1].describe()

    def fail(self, *errors: Exception, lost: bool = False, end: str = "shutdown") -> None:
        self._then("after_worker_group_poll_status", SimpleNamespace(errors=dict(enumerate(errors))))
        self.pool.had_lost_workers = lost
        self._then(f"after_worker_group_{end}", None)


def record(cause: str, end: float, start: float) -> dict[str, Any]:
    return {"cause": cause, "seconds": {"end": end, "start": start}, "images_repeated": 0}


def test_each_restart_has_its_cause_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    assert run.start() == record("submitted again", 0, 8), "7 s before the record, and the resize decision"
    run._then("after_worker_group_poll_status", SimpleNamespace(errors={}))
    for errors, cause in (((LOST,), "worker lost"), ((RAISED, LOST), "worker lost"), ((RAISED,), "worker failed")):
        run.fail(*errors)
        assert run.start() == record(cause, 1, 2)
    run.fail(LOST, SILENT)
    assert run.start() == record("worker does not respond", 1, 2)
    run._then("before_controller_execute_resize_decision", None)
    run._then("after_worker_group_shutdown", None)
    assert run.start() == record("resize", 1, 2)
    run._then("before_controller_execute_resize_decision", None)
    run.pause.stopped = run.now - 0.25
    run._then("after_worker_group_shutdown", None)
    assert run.start() == record("resize", 0.25, 2), "the workers trained until they stopped"


def test_a_worker_whose_peers_reported_their_errors_first_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.start()
    run.fail(RAISED, lost=True)
    assert run.start()["cause"] == "worker lost"


@pytest.mark.parametrize("responds", [True, False])
def test_a_group_that_fails_at_its_start_belongs_to_the_restart(
    responds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(monkeypatch)
    run.start(trains=False)
    run.fail(RAISED)
    assert run.start() == record("submitted again", 10, 2)
    run.fail(SILENT)
    run.responds = responds
    run.start(trains=False)
    run.fail(LOST, end="abort")
    run.responds = True
    assert run.start() == record("worker does not respond", 5, 2)


def test_workers_that_do_not_respond_to_the_record_may_train(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.responds = False
    with pytest.raises(IndexError):
        run.start()
    run.responds = True
    run.fail(LOST)
    assert run.start() == record("worker lost", 1, 2)


def test_a_controller_that_is_started_again_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Run(monkeypatch, retry=1).start() == record("controller failed", 0, 1)


def test_a_worker_takes_a_record_once() -> None:
    given = Recovery("resize", {})
    recovery._set_recovery(given)
    assert recovery.take_recovery() is given and recovery.take_recovery() is None


def test_the_first_attempt_is_no_restart(tmp_path: Path) -> None:
    def attempt() -> None:
        AttemptRecord(str(tmp_path), 2, Recovery("submitted again", {"end": 0.0, "start": 8.0}))

    attempt()
    attempt()
    first, second = storage.read_json(str(tmp_path / ATTEMPTS))
    assert "recovery" not in first
    assert second["recovery"] == record("submitted again", 0, 8)
