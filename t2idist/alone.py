"""A run on one worker in this process, without Ray."""

from __future__ import annotations

import signal
import sys
import threading

import torch

from t2idist import worker
from t2idist.config import RunConfig
from t2idist.engine.notice import Notice
from t2idist.evaluate.progress import ProgressPrinter


def train(config: RunConfig) -> None:
    """All stages of the run. Raises `Left` where a SIGTERM ended it, its state saved."""
    worker.clear_fatal(config)
    printer = ProgressPrinter(sys.stdout)
    device = torch.device("cuda" if config.cluster.gpus_per_worker else "cpu")
    told = threading.Event()

    def ask() -> Notice | None:
        return Notice(0.0) if told.is_set() else None

    before = signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        worker.main(config, device, worker.Around(watch=printer.show, ask=ask))
    finally:
        signal.signal(signal.SIGTERM, before)
        printer.close()
