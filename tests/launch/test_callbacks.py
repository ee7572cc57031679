"""Callbacks of the controller: stop on SIGTERM, pause before a resize, nodes that are left out."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from t2idist.launch import callbacks, ray_internals


class _Interrupted(Exception):
    """Raised by the SIGTERM handler that was set before."""


def test_sigterm_asks_the_running_workers_to_stop_and_those_that_replace_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: queue.Queue[list[str]] = queue.Queue()
    monkeypatch.setattr(callbacks, "_stop_workers", stopped.put)

    def previous_handler(*_: object) -> None:
        raise _Interrupted

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def group(*workers: str) -> SimpleNamespace:
        return SimpleNamespace(get_workers=lambda: workers)

    original = signal.signal(signal.SIGTERM, previous_handler)
    callback = callbacks.StopOnSigterm()
    try:
        with callback.on_sigterm(), pytest.raises(_Interrupted):
            terminate()  # no workers yet: nothing to save
        callback = callbacks.StopOnSigterm()
        with callback.on_sigterm():
            callback.after_worker_group_training_start(group("a", "b"))
            terminate()
            assert stopped.get(timeout=10) == ["a", "b"]
            callback.before_worker_group_abort(None)
        with callback.on_sigterm():  # the controller failed and was started again
            callback.after_worker_group_training_start(group("c"))
            assert stopped.get(timeout=10) == ["c"]
            with pytest.raises(_Interrupted):
                terminate()  # the second one
        assert signal.getsignal(signal.SIGTERM) is previous_handler
    finally:
        signal.signal(signal.SIGTERM, original)


class _Worker:
    """Runs functions in this process; `answers` are the results, one per call."""

    def __init__(self, *answers: float | None) -> None:
        self.answers, self.metadata = list(answers), SimpleNamespace(node_id="node")


def test_resize_waits_until_all_workers_are_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = []

    def call(workers: list[_Worker], function: object, seconds: float) -> list[float | None]:
        functions.append(function)
        return [worker.answers.pop(0) for worker in workers]

    monkeypatch.setattr(callbacks, "call_workers", call)
    monkeypatch.setattr(callbacks, "_POLL_SECONDS", 0.01)
    callback = callbacks.PauseBeforeResize(10.0, SimpleNamespace(ping=set))
    callback.before_controller_execute_resize_decision(None)
    assert functions == []  # no workers yet
    workers = _Worker(None, 1.0, 100.0), _Worker(None, None, 0.0)
    callback.after_worker_group_training_start(SimpleNamespace(get_workers=lambda: workers))
    callback.before_controller_execute_resize_decision(None)
    assert functions == [callbacks._request_pause] * 3
    assert 100 <= time.monotonic() - callback.stopped < 101, "the first worker decides for all"
    callback.before_controller_execute_failure_decision(None)
    callback.before_controller_execute_resize_decision(None)
    assert len(functions) == 3  # after a failure nobody is asked


@pytest.mark.parametrize("silent", [set(), {"node"}])
def test_resize_waits_for_a_busy_worker_but_not_for_a_lost_node(
    silent: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def call(workers: list[_Worker], function: object, seconds: float) -> list[float]:
        calls.append(seconds)
        if len(calls) == 1:
            raise GetTimeoutError("no response")
        return [0.0]

    monkeypatch.setattr(callbacks, "call_workers", call)
    monkeypatch.setattr(callbacks, "_POLL_SECONDS", 0.01)
    callback = callbacks.PauseBeforeResize(10.0, SimpleNamespace(ping=lambda: silent))
    callback.after_worker_group_training_start(SimpleNamespace(get_workers=lambda: [_Worker()]))
    callback.before_controller_execute_resize_decision(None)
    assert calls == [callbacks._PAUSE_RESPONSE_SECONDS] * (1 if silent else 2)


def test_workers_are_not_placed_on_nodes_that_are_left_out() -> None:
    liveness: Any = SimpleNamespace(silent=set(), unprepared=set())
    check = callbacks.CheckNodes(liveness)
    assert check.on_controller_start_worker_group(scaling_config=None, num_workers=2) is None
    liveness.silent, liveness.unprepared = {"b"}, {"a"}
    selector = check.on_controller_start_worker_group(scaling_config=None, num_workers=2)
    assert selector == {ray_internals.RAY_NODE_ID_KEY: "!in(a,b)"}


def test_pause_counts_from_the_last_step() -> None:
    try:
        assert not callbacks.must_pause() and callbacks._request_pause() is None
        assert callbacks.must_pause() and callbacks._request_pause() is None, "it copies its state first"
        callbacks._stopped[0] -= 5
        assert callbacks.must_pause()
        callbacks._paused.set()
        paused = callbacks._request_pause()
        assert paused is not None and 5 <= paused < 6
        callbacks.pause(0.0)
        assert not callbacks.must_pause(), "the resize was called off"
    finally:
        callbacks.forget_requests()


@pytest.mark.parametrize("end", [lambda: callbacks._set_shutdown_time(None), callbacks._request_stop])
def test_wait_for_a_shutdown_ends_if_it_is_called_off_or_the_run_is_to_stop(end: Callable[[], None]) -> None:
    try:
        callbacks._set_shutdown_time(time.time() + 60)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(callbacks.pause, 60.0)
            time.sleep(0.3)
            assert callbacks._paused.is_set() and not waiting.done()
            end()
            waiting.result(10)
        assert not callbacks._paused.is_set()
    finally:
        callbacks.forget_requests()
