"""Run on one worker in this process, without Ray."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from t2idist.config import RunConfig
from t2idist.engine.preemption import PreemptionNotice
from t2idist.observability.command import in_main_thread
from t2idist.observability.logs import LogContext
from t2idist.observability.progress import ProgressPrinter
from t2idist.training import worker
from t2idist.training.lifecycle import OnProgress, clear_fatal
from t2idist.training.options import StopAfter


def run_local(
    config: RunConfig, stop_after: StopAfter | None, on_progress: OnProgress, log_context: LogContext
) -> None:
    """Train the stages of the run, up to `stop_after` if it is given.

    Args:
        on_progress: called with each progress message.
        log_context: kept up to date with the stage and images.

    Raises:
        StopRequested: The process received SIGTERM; the state is saved.
    """
    clear_fatal(config)
    printer = ProgressPrinter(sys.stdout, as_json=config.report.json_logs)
    device = (torch.accelerator.current_accelerator() if config.cluster.gpus_per_worker else None) or torch.device(
        "cpu"
    )
    sigterm_received = threading.Event()

    def poll() -> PreemptionNotice | None:
        return PreemptionNotice(0.0) if sigterm_received.is_set() else None

    def show(message: dict[str, Any]) -> None:
        printer.show(message)
        on_progress(message)

    context = worker.WorkerContext(
        on_progress=show, poll_preemption=poll, stop_after=stop_after, log_context=log_context
    )
    try:
        with _on_sigterm(sigterm_received):
            worker.main(config, device, context)
    finally:
        printer.close()


@contextlib.contextmanager
def _on_sigterm(received: threading.Event) -> Iterator[None]:
    """Set the event at SIGTERM while the block runs."""
    if not in_main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
