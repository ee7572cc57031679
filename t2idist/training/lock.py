"""One process trains a run: a second ``--local`` run of the same name is refused while the first one lives."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.engine.metrics import PROGRESS, now
from t2idist.training.lifecycle import RunIsTaken, run_is_taken
from t2idist.training.stages import run_url

logger = logging.getLogger(__name__)

LOCK = ".lock"
GUARD = ".lock.guard"
"""Lock of the moment in which a process takes the other one and writes that it holds it."""
GUARD_SECONDS = 10.0
HOLDER = ".running.json"
"""The process that trains the run: host, pid, and since when."""
HEARTBEAT_SECONDS = 120.0
"""A run that trains in an object store reports more often than this."""


@contextlib.contextmanager
def only_one(config: RunConfig) -> Iterator[None]:
    """Hold the lock of a run's folder while the block runs. The lock of a process that has died is free.

    An object store has no locks: there, the run's last report says which process of this machine trains it; a fresh
    report of another machine is a warning, because that machine may have been lost.

    Raises:
        ValueError: Another process trains the run.
    """
    folder = storage.local_path(run_url(config))
    if folder is None:
        _check_heartbeat(config)
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = _acquire(config, folder)
    try:
        yield
    finally:
        if lock is not None:
            storage.remove(str(folder / HOLDER))
            lock.release()


def _acquire(config: RunConfig, folder: Path) -> FileLock | None:
    try:
        with FileLock(folder / GUARD, timeout=GUARD_SECONDS):
            return _lock_and_sign(folder)
    except Timeout:
        raise _taken(config, _read(folder / HOLDER)) from None
    except NotImplementedError:
        logger.warning("%s: the file system has no locks; start only one run of this name", folder)
        return None


def _lock_and_sign(folder: Path) -> FileLock:
    """Lock the run and write who holds the lock; raises Timeout if a process that may live holds it.

    The guard makes this one step: nobody sees a new lock beside the name of a dead holder, and takes it over.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        if not _is_dead(_read(folder / HOLDER)):
            raise
        (folder / LOCK).unlink(missing_ok=True)  # a process that the dead one had forked still holds the old lock
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    storage.write_json(str(folder / HOLDER), {"host": socket.gethostname(), "pid": os.getpid(), "time": now()})
    return lock


def _check_heartbeat(config: RunConfig) -> None:
    url = storage.join(run_url(config), PROGRESS)
    progress = storage.read_json_if_present(url)
    if progress is None:
        return
    process = progress.get("process") or {}
    age = _age_seconds(progress)
    if progress.get("state") != "training" or not process or age is None or age > HEARTBEAT_SECONDS:
        return
    if process["host"] != socket.gethostname():
        logger.warning(
            "%s: process %s on %s reported %.0f s ago; if it still trains this run, stop one of the two",
            config.name, process["pid"], process["host"], age,
        )  # fmt: skip
    elif process["pid"] != os.getpid() and not _is_dead(process):
        raise _taken(config, {**process, "time": progress["time"]})


def _taken(config: RunConfig, holder: Mapping[str, Any]) -> RunIsTaken:
    age = _age_seconds(holder)
    since = "" if age is None else f" since {_format_age(age)}"
    return run_is_taken(config, f"process {holder.get('pid', '?')} on {holder.get('host', '?')}", since)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = storage.read_json(str(file))
    except (OSError, ValueError):  # not written yet
        return {}
    return content if isinstance(content, dict) else {}


def _is_dead(process: Mapping[str, Any]) -> bool:
    """Return whether a process of this machine has ended; False if it is not known."""
    if process.get("host") != socket.gethostname() or not isinstance(process.get("pid"), int):
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user
        return False
    return False


def _age_seconds(record: Mapping[str, Any]) -> float | None:
    try:
        moment = datetime.datetime.fromisoformat(str(record["time"]))
        return max(0.0, (datetime.datetime.now(datetime.UTC) - moment).total_seconds())
    except (KeyError, ValueError, TypeError):
        return None


def _format_age(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h"
