"""The process: names and priorities of its threads, as Linux shows them, its age, and the memory that is available."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TRAINING_THREAD = "t2idist-rank"
"""Name of the thread of a worker that trains, followed by the rank of the worker."""
COMMIT_VARIABLE = "T2IDIST_GIT"
"""Environment variable with the commit of a working directory without .git."""
_LOWEST_PRIORITY = 19
_CACHED = ("inactive_file", "active_file", "slab_reclaimable")
"""Counters of a cgroup's memory that the kernel frees when it is needed."""


def name_this_thread(name: str) -> None:
    """Name the calling thread, with at most 15 characters."""
    with contextlib.suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)


def kill(pid: int) -> None:
    """End a process of this machine at once, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def rename_threads(prefix: str, name: str) -> None:
    """Rename the threads of this process whose name starts with `prefix`. A thread has the name of its creator."""
    for comm in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if comm.read_text().startswith(prefix):
                comm.write_text(name)


def lower_priority_of_this_thread() -> None:
    """Let the calling thread run only when no other thread wants its core."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)


def reset_priority(thread: int) -> None:
    """Give a thread of this process the priority of its main thread again; only root may."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, os.getpid()))


def seconds_since_start() -> float:
    """Return the age of this process; 0 if unknown."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return 0.0


class AvailableMemory(NamedTuple):
    """Bytes of memory, and how many of them are available."""

    available: float
    total: float


def memory() -> AvailableMemory:
    """Return the memory of this machine or, if a smaller share of it is available, of the container (cgroup v2)."""
    known = [*_of_machine(Path("/proc/meminfo")), *_of_containers(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))]
    return min(known, key=lambda memory: memory.available / memory.total, default=AvailableMemory(math.inf, math.inf))


def _of_machine(file: Path) -> Iterator[AvailableMemory]:
    with contextlib.suppress(OSError):
        pairs = (line.partition(":") for line in file.read_text().splitlines())
        kilobytes = {name: int(value.split()[0]) for name, _, value in pairs}
        yield AvailableMemory(1024.0 * kilobytes["MemAvailable"], 1024.0 * kilobytes["MemTotal"])


def _of_containers(root: Path, membership: Path) -> Iterator[AvailableMemory]:
    """Yield the memory of each cgroup of this process that has a limit. Cached files count as available."""
    with contextlib.suppress(OSError, StopIteration):
        path = next(line for line in membership.read_text().splitlines() if line.startswith("0::"))[3:]
        here = root / path.strip("/")
        for folder in (here, *(each for each in here.parents if each.is_relative_to(root))):
            with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
                limit, used = (float((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
                counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = sum(float(counters.get(name, 0)) for name in _CACHED)
                yield AvailableMemory(max(0.0, limit - used + cached), limit)
