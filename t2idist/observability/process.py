"""The process: names and priorities of its threads, as Linux shows them, and variables of its environment."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
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


def available_memory_share() -> float:
    """Return the share of this machine's memory that is available; 1 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1.0
    kilobytes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return kilobytes["MemAvailable"] / kilobytes["MemTotal"]
