"""What Prometheus sees of a run: gauges of the driver, which Ray's agent on its machine exports.

The driver outlives workers, so "no step since" can be told of a run whose workers are gone; its series end with it.
Prometheus finds each under its name here behind ``ray_``, with the label run.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ray.util.metrics import Gauge

PREFIX = "ray_"
METRICS = {
    "t2idist_images": "images seen in the stage",
    "t2idist_budget_images": "images of the stage in all",
    "t2idist_images_per_second": "training speed, all workers together",
    "t2idist_step_seconds": "mean time of a step, by phase: train, data, pictures, checkpoint",
    "t2idist_data_wait_ratio": "share of the time waited for data, by the worker that waited most",
    "t2idist_loss": "mean since the last report, by name",
    "t2idist_goodput_ratio": "share of this submission's time that went into steps that were kept",
    "t2idist_workers": "workers at present",
    "t2idist_restarts": "restarts of the run",
    "t2idist_step_timestamp_seconds": "when a step was last told",
    "t2idist_checkpoint_timestamp_seconds": "when the newest whole checkpoint was begun",
    "t2idist_checkpoint_stall_seconds": "how long the training stood still for it",
    "t2idist_skipped_steps": "steps of this attempt that were not finite, and skipped",
    "t2idist_quarantined_samples": "samples of the stage that were unusable",
    "t2idist_device_memory_bytes": "most accelerator memory that a worker has held",
}
"""Names and what they say."""
LABELS = {
    "t2idist_images": ("stage",),
    "t2idist_budget_images": ("stage",),
    "t2idist_loss": ("stage", "name"),
    "t2idist_step_seconds": ("phase",),
}
"""Labels beside run."""
_VALUES = {
    "t2idist_data_wait_ratio": "data/wait_share",
    "t2idist_skipped_steps": "guard/skipped_steps",
    "t2idist_quarantined_samples": "data/quarantined",
}
_PHASES = ("data", "pictures", "checkpoint")


class Gauges:
    """The gauges of a run's driver."""

    def __init__(self, run: str) -> None:
        self._goodput = Goodput(time.time())
        self._gauges = {
            name: Gauge(name, text, ("run", *LABELS.get(name, ()))).set_default_tags({"run": run})
            for name, text in METRICS.items()
        }
        self._gauges["t2idist_step_timestamp_seconds"].set(time.time())

    def show(self, message: Mapping[str, Any]) -> None:
        """Take in a progress message."""
        for name, labels, value in readings(message):
            self._gauges[name].set(value, dict(zip(LABELS.get(name, ()), labels, strict=True)))
        self._gauges["t2idist_goodput_ratio"].set(self._goodput.after(message, time.time()))


def readings(message: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Name, values of its `LABELS` and value of all that a progress message tells."""
    stage = str(message["stage"])
    for name in ("images", "budget_images"):
        yield f"t2idist_{name}", (stage,), float(message[name])
    for name in ("images_per_second", "workers", "restarts"):
        yield f"t2idist_{name}", (), float(message[name])
    yield "t2idist_step_timestamp_seconds", (), _seconds(message["time"])
    values = message["values"]
    for name, key in _VALUES.items():
        if key in values:
            yield name, (), float(values[key])
    if "time/step" in values:
        yield (
            "t2idist_step_seconds",
            ("train",),
            values["time/step"] - sum(values[f"time/{phase}"] for phase in _PHASES),
        )
        for phase in _PHASES:
            yield "t2idist_step_seconds", (phase,), float(values[f"time/{phase}"])
    if "memory/device_gib" in values:
        yield "t2idist_device_memory_bytes", (), values["memory/device_gib"] * 2**30
    for name, value in message["losses"].items():
        yield "t2idist_loss", (stage, name), float(value)
    checkpoint = message["checkpoint"]
    if checkpoint.get("time"):
        yield "t2idist_checkpoint_timestamp_seconds", (), _seconds(checkpoint["time"])
    if "stall_seconds" in checkpoint:
        yield "t2idist_checkpoint_stall_seconds", (), float(checkpoint["stall_seconds"])


class Goodput:
    """How much of the time since `began` (seconds since the epoch) went into steps that were kept."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def after(self, message: Mapping[str, Any], moment: float) -> float:
        """The share up to now. A message's seconds are those of its stage's kept steps, over all submissions."""
        stage = message["stage"]
        self._first.setdefault(stage, message["seconds"])
        self._last[stage] = message["seconds"]
        kept = sum(last - self._first[stage] for stage, last in self._last.items())
        return min(1.0, max(0.0, kept / max(moment - self._began, 1e-9)))


def _seconds(time_iso: str) -> float:
    return datetime.datetime.fromisoformat(time_iso).timestamp()
