"""A run on one worker in this process, without Ray."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

import torch

from t2idist.config import RunConfig
from t2idist.engine.preemption import PreemptionNotice
from t2idist.observability.logs import LogContext
from t2idist.observability.progress import ProgressPrinter
from t2idist.training import worker
from t2idist.training.lifecycle import OnProgress, clear_fatal
from t2idist.training.options import StopAfter


def run_local(config: RunConfig, stop: StopAfter | None, watch: OnProgress, place: LogContext) -> None:
    """The stages of the run, up to where it is to stop. Raises `Left` where a SIGTERM ended it, its state saved.

    watch: gets the progress messages. place: is kept up to date with where the run is.
    """
    clear_fatal(config)
    printer = ProgressPrinter(sys.stdout, as_json=config.report.json_logs)
    device = torch.device("cuda" if config.cluster.gpus_per_worker else "cpu")
    told = threading.Event()

    def ask() -> PreemptionNotice | None:
        return PreemptionNotice(0.0) if told.is_set() else None

    def show(message: dict[str, Any]) -> None:
        printer.show(message)
        watch(message)

    before = signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        worker.main(config, device, worker.WorkerContext(watch=show, ask=ask, stop=stop, place=place))
    finally:
        signal.signal(signal.SIGTERM, before)
        printer.close()
