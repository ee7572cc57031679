"""A worker process that serves one worker group after another (see `worker_pool`)."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.train import get_context

from t2idist.engine.checkpoint.replica_protocol import CHECKPOINT_THREAD, REPLICA_THREAD
from t2idist.launch import callbacks, interfaces
from t2idist.launch.health import StepClock, StepStatus
from t2idist.launch.ray_internals import RayTrainWorker, get_train_context
from t2idist.observability import logs, process

_POLL_SECONDS = 0.05
_MEMORY_SHARE, _MEMORY_BYTES = 0.1, 0.7e9
"""Of the memory of the machine or container: with less available, no spare process is prepared."""

_accelerator_ids: list[str] = []
"""Of this worker process: the ids of its GPUs, as Ray counts them."""
_training_threads: list[int] = []
"""Of this worker process: the thread that trains or has trained, as `threading.get_ident()`."""
step_clock = StepClock()
"""Of this worker process."""


class PooledWorker(RayTrainWorker):  # type: ignore[misc]
    """Ray Train's worker, which can serve several groups one after the other.

    Args:
        environment: Set before torch is imported.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        super().__init__()
        self._loading: threading.Thread | None = None

    def poll_status(self) -> StepStatus:
        """Return Ray Train's status with the time of a step."""
        status = super().poll_status()
        return StepStatus(**vars(status), step_seconds=step_clock.median())

    def prepare(self, run_url: str, systems: Sequence[str]) -> bool:
        """Begin to load what training needs, at the lowest priority; return whether there is memory for it.

        Args:
            run_url: As in `warm_up`.
            systems: As in `warm_up`.
        """
        memory = process.memory()
        if memory.available < max(_MEMORY_SHARE * memory.total, _MEMORY_BYTES):
            return False
        self._loading = threading.Thread(target=_load_quietly, args=(run_url, systems), name="prepare", daemon=True)
        self._loading.start()
        return True

    def is_prepared(self) -> bool:
        """Return whether all that training needs is loaded."""
        return self._loading is None or not self._loading.is_alive()

    def assign(self, accelerator_ids: Sequence[str]) -> Any:
        """Use these GPUs; return Ray's metadata of this worker."""
        step_clock.pause()
        if self._loading is not None and self._loading.native_id is not None:
            process.reset_priority(self._loading.native_id)
        _accelerator_ids[:] = accelerator_ids
        return replace(self.get_metadata(), accelerator_ids={"GPU": list(accelerator_ids)} if accelerator_ids else {})

    def recycle(self, seconds: float, lost: Collection[str]) -> str:
        """Wait at most `seconds` for the end of the training; return why this process cannot train again, or "".

        The training ends by itself once a peer closes its connections. A node that stopped responding closes none, so
        those to its address are closed here.

        Args:
            lost: Addresses of the nodes of lost workers.
        """
        runner = get_train_context().execution_context.training_thread_runner
        deadline = time.monotonic() + seconds
        callbacks.release()
        interfaces.close_connections(set(lost) - {self.get_metadata().node_ip})
        while (busy := "training" if runner.is_running() else _writer()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if busy:
            return f"its {busy} did not end within {seconds:g} s{_where(busy)}"
        if "deepspeed" in sys.modules:
            return "DeepSpeed cannot join another process group"
        callbacks.forget_requests()
        return "" if _is_reusable_after(runner.get_error()) else "its device or memory failed"


def own_accelerator_ids() -> list[str]:
    """Return the ids of the GPUs that are assigned to this worker process."""
    return _accelerator_ids


@contextlib.contextmanager
def train_in_group() -> Iterator[None]:
    """Train as a member of the process group; then leave it, so that peers that wait for this worker go on."""
    from t2idist.engine.world import leave_process_group

    process.name_this_thread(f"{process.TRAINING_THREAD}{get_context().get_world_rank()}")
    _training_threads[:] = [threading.get_ident()]
    if not gc.get_freeze_count():  # what the imports made is not searched for garbage again
        gc.freeze()
    try:
        yield
    except BaseException as error:
        _clear_frames(error)  # they refer to networks, which refer to the group
        raise
    finally:
        leave_process_group()
        process.rename_threads(process.TRAINING_THREAD, "python")


def _clear_frames(error: BaseException | None) -> None:
    """Clear the local variables of the functions that raised an error, and the errors during whose handling it was."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _writer() -> str:
    """Return the name of the thread that still writes a checkpoint or a replica of the group that has ended, or ""."""
    names = [thread.name for thread in threading.enumerate()]
    return next((name for name in names if name in (CHECKPOINT_THREAD, REPLICA_THREAD)), "")


def _where(name: str) -> str:
    """Return in which function a thread is; `name`: as `_writer` returns it, or "training"."""
    ids = {thread.ident for thread in threading.enumerate() if thread.name == name} or set(_training_threads)
    frames = [frame for ident, frame in sys._current_frames().items() if ident in ids]
    return f", in {frames[0].f_code.co_qualname}" if frames else ""


def _is_reusable_after(error: BaseException | None) -> bool:
    """Return whether a process can train after this error. An error of the device may have broken its context."""
    import torch

    cause = getattr(error, "_base_exc", error)  # Ray Train wraps the errors of a training
    return not isinstance(cause, torch.AcceleratorError | MemoryError)


def _load_quietly(run_url: str, systems: Sequence[str]) -> None:
    from t2idist import storage

    logs.configure(logging.WARNING)
    storage.start_event_loop()
    process.lower_priority_of_this_thread()
    from t2idist.training.warm_up import warm_up

    warm_up(run_url, systems)
    for module in ("t2idist.launch.submit", "ray.tune"):  # what the first messages of a group refer to
        importlib.import_module(module)
