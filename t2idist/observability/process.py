"""The process: names and priorities of its threads, as Linux shows them, and variables of its environment."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

TRAINING_THREAD = "t2idist-rank"
"""Name of the thread of a worker that trains, followed by the rank of the worker."""
COMMIT_VARIABLE = "T2IDIST_GIT"
"""Environment variable with the commit of a working directory without .git."""
_LOWEST_PRIORITY = 19


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


def available_memory_share() -> float:
    """Return the share of this machine's or, if smaller, this container's memory that is available; 1 if unknown."""
    of_container = _available_share_of_container(Path("/sys/fs/cgroup"))
    return min(_available_share_of_machine(Path("/proc/meminfo")), of_container)


def _available_share_of_machine(file: Path) -> float:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 1.0
    kilobytes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return kilobytes["MemAvailable"] / kilobytes["MemTotal"]


def _available_share_of_container(cgroup: Path) -> float:
    """Of a container with a limit (cgroup v2); the cache of files that it has read is available."""
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        counters = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 1.0
    if limit == "max":
        return 1.0
    return max(0.0, 1 - (int(used) - int(counters.get("inactive_file", 0))) / int(limit))
