"""One process trains a run of one name; a run can be started in a thread."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from t2idist import run, storage
from t2idist.training.lock import HOLDER, LOCK, only_one
from tests.helpers.object_store import seaweedfs
from tests.helpers.runs import (
    ROOT,
    check_finished,
    command_environment,
    command_line,
    images_in_progress,
    load_config,
    run_command,
    write_recipe,
)


def stamp(seconds_ago: float = 0) -> str:
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)).isoformat()


@pytest.mark.whole
def test_second_run_of_a_name_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    longer = ["stages.attngan.images=8000", "stages.attngan.checkpoint_every_images=8000"]
    first = subprocess.Popen(
        command_line(str(file), "--local", *longer), cwd=ROOT, env=command_environment(), stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not images_in_progress(tmp_path / "runs/tiny", "attngan"):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        second = run_command(str(file), "--local", *longer)
        assert second.returncode == 2
        pattern = (
            rf"error: name: process {first.pid} on \S+ trains the run tiny in {tmp_path}/runs since \d+ s; "
            r"wait for it or stop it, or give name=ANOTHER for a new run\n"
        )
        assert re.fullmatch(pattern, second.stderr), second.stderr
        assert not (tmp_path / "runs/tiny/outcome.json").exists() and first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    third = run_command(str(file), "--local")  # the lock of a dead process is free
    assert third.returncode == 0, third.stderr
    check_finished(tmp_path)
    assert not (tmp_path / "runs/tiny" / HOLDER).exists()


def test_lock_of_a_dead_process_is_taken_over_even_if_its_child_holds_it(tmp_path: Path) -> None:
    config = load_config(tmp_path)
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    code = f"import fcntl, time; f = open({str(folder / LOCK)!r}, 'w'); fcntl.flock(f, 2); print('held', flush=True); "
    child = subprocess.Popen([sys.executable, "-c", code + "time.sleep(60)"], stdout=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    try:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        holder = {"host": socket.gethostname(), "pid": child.pid, "time": stamp(300)}
        storage.write_json(str(folder / HOLDER), holder)
        with pytest.raises(ValueError, match=f"process {child.pid} on .* since 5 min"), only_one(config):
            raise AssertionError("two processes hold the lock")
        storage.write_json(str(folder / HOLDER), {**holder, "pid": dead.pid})
        with only_one(config):
            assert json.loads((folder / HOLDER).read_text())["pid"] == os.getpid()
    finally:
        child.kill()
        child.wait()


CONTENDERS = """
import os, sys, time
from t2idist.training.lock import only_one
from tests.helpers.runs import load_config
from pathlib import Path

config = load_config(Path(sys.argv[1]))
start = time.time() + 0.5
for number in range(6):
    if os.fork() == 0:
        while time.time() < start:
            pass
        try:
            with only_one(config):
                os.write(1, b"holds\\n")
                time.sleep(1.5)
        except ValueError as error:
            os.write(1, b"refused\\n")
        os._exit(0)
for number in range(6):
    os.wait()
"""
"""Processes that start the same run at the same moment."""


@pytest.mark.whole
def test_of_processes_that_start_together_after_a_kill_one_takes_the_lock(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    for _ in range(2):
        storage.write_json(str(folder / HOLDER), {"host": socket.gethostname(), "pid": dead.pid, "time": stamp(300)})
        line = [sys.executable, "-c", CONTENDERS, str(tmp_path)]
        done = subprocess.run(line, cwd=ROOT, env=command_environment(), capture_output=True, text=True, check=True)
        assert sorted(done.stdout.split()) == ["holds", *["refused"] * 5], done.stderr


@pytest.mark.whole
def test_fresh_report_of_a_living_process_refuses_a_run_in_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with seaweedfs() as environment:
        for key, value in environment.items():
            if key.startswith("AWS"):
                monkeypatch.setenv(key, value)
        config = load_config(tmp_path, "storage=s3://bucket/runs")
        with only_one(config):
            pass
        living, here = os.getppid(), socket.gethostname()

        def report(pid: int, host: str, seconds_ago: float, state: str = "training") -> None:
            content = {"state": state, "time": stamp(seconds_ago), "process": {"host": host, "pid": pid}}
            storage.write_json("s3://bucket/runs/tiny/progress.json", content)

        report(living, here, 5)
        with pytest.raises(ValueError, match=f"process {living} on {here} trains the run tiny in s3://bucket/runs"):
            only_one(config).__enter__()
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        for free in ((living, here, 500.0), (living, here, 5.0, "done"), (dead.pid, here, 5.0)):
            report(*free)  # type: ignore[arg-type]
            with only_one(config):
                pass
        assert not caplog.records
        report(living, "another-host", 5)
        with only_one(config):
            pass
        assert "on another-host reported 5 s ago" in caplog.text


@pytest.mark.whole
def test_run_trains_in_a_thread(tmp_path: Path) -> None:
    statuses: list[int] = []
    arguments = [str(write_recipe(tmp_path)), "--local", "stages.damsm.images=16", "stages.attngan.images=16"]
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: statuses.append(run.main(arguments)))
    thread.start()
    thread.join(240)
    assert statuses == [0] and signal.getsignal(signal.SIGTERM) == before
    assert (tmp_path / "runs/tiny/attngan/export/export.json").exists()
