"""Prometheus metrics of a run: gauges of the driver, exported by the Ray agent of its node.

The driver outlives the workers, so "no step since" can be observed if all workers are lost; the series end with the
driver. Prometheus sees each metric as ``ray_<name>`` with the label run.
"""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

PREFIX = "ray_"
METRICS = {
    "t2idist_images": "images seen in the stage",
    "t2idist_budget_images": "total images of the stage",
    "t2idist_images_per_second": "training speed of all workers together",
    "t2idist_step_seconds": "mean time of a step, by phase: train, data, pictures, checkpoint",
    "t2idist_data_wait_ratio": "share of the time spent waiting for data, of the worker that waited most",
    "t2idist_loss": "mean since the last report, by name",
    "t2idist_goodput_ratio": "share of this submission's time spent in steps that were kept",
    "t2idist_workers": "current number of workers",
    "t2idist_restarts": "restarts of the run",
    "t2idist_recoveries": "finished recoveries that this driver has seen, by cause",
    "t2idist_recovery_seconds": "duration of the last restart, by phase: end, start, restore",
    "t2idist_recovery_images": "images that were repeated after the last restart",
    "t2idist_step_timestamp_seconds": "time of the last reported step",
    "t2idist_checkpoint_timestamp_seconds": "time when the newest complete checkpoint was started",
    "t2idist_checkpoint_stall_seconds": "time that training was blocked by that checkpoint",
    "t2idist_skipped_steps": "non-finite steps of this attempt, which were skipped",
    "t2idist_quarantined_samples": "unreadable samples of the stage",
    "t2idist_device_memory_bytes": "peak accelerator memory of a worker",
}
"""Descriptions by name."""
LABELS = {
    "t2idist_images": ("stage",),
    "t2idist_budget_images": ("stage",),
    "t2idist_loss": ("stage", "name"),
    "t2idist_step_seconds": ("phase",),
    "t2idist_recoveries": ("cause",),
    "t2idist_recovery_seconds": ("phase",),
}
"""Labels in addition to run."""
_VALUES = {
    "t2idist_data_wait_ratio": "data/wait_share",
    "t2idist_skipped_steps": "guard/skipped_steps",
    "t2idist_quarantined_samples": "data/quarantined",
}
_PHASES = ("data", "pictures", "checkpoint")


class Gauge(Protocol):
    """A metric such as `ray.util.metrics.Gauge`."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None: ...

    def set_default_tags(self, default_tags: dict[str, str]) -> Self: ...

    def set(self, value: float, tags: dict[str, str] = ...) -> None: ...


class Gauges:
    """The gauges of a run's driver."""

    def __init__(self, run: str, gauge_type: type[Gauge]) -> None:
        self._goodput, self._recoveries = Goodput(time.time()), Recoveries()
        self._gauges = {
            name: gauge_type(name, text, ("run", *LABELS.get(name, ()))).set_default_tags({"run": run})
            for name, text in METRICS.items()
        }
        self._gauges["t2idist_step_timestamp_seconds"].set(time.time())

    def update(self, message: Mapping[str, Any]) -> None:
        """Set the gauges to the values of a progress message."""
        for name, labels, value in readings(message):
            self._gauges[name].set(value, dict(zip(LABELS.get(name, ()), labels, strict=True)))
        self._gauges["t2idist_goodput_ratio"].set(self._goodput.update(message, time.time()))
        for cause, count in self._recoveries.update(message).items():
            self._gauges["t2idist_recoveries"].set(count, {"cause": cause})


def readings(message: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Yield (name, values of its `LABELS`, value) for each metric in a progress message."""
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
    if recovery := message.get("recovery"):
        for phase, seconds in recovery["seconds"].items():
            yield "t2idist_recovery_seconds", (phase,), float(seconds)
        yield "t2idist_recovery_images", (), float(recovery["images_repeated"])
    if "memory/device_gib" in values:
        yield "t2idist_device_memory_bytes", (), values["memory/device_gib"] * 2**30
    for name, value in message["losses"].items():
        yield "t2idist_loss", (stage, name), float(value)
    checkpoint = message["checkpoint"]
    if checkpoint.get("time"):
        yield "t2idist_checkpoint_timestamp_seconds", (), _seconds(checkpoint["time"])
    if "stall_seconds" in checkpoint:
        yield "t2idist_checkpoint_stall_seconds", (), float(checkpoint["stall_seconds"])


class Recoveries:
    """Number of finished recoveries that progress messages report, by cause."""

    def __init__(self) -> None:
        self._restarts = -1
        self._counts: Counter[str] = Counter()

    def update(self, message: Mapping[str, Any]) -> Mapping[str, int]:
        """Return the numbers up to this message. After the first step, messages of its stage have the record."""
        if (recovery := message.get("recovery")) and message["restarts"] != self._restarts:
            self._restarts = message["restarts"]
            self._counts[recovery["cause"]] += 1
        return self._counts


class Goodput:
    """Share of the time since `start` (seconds since the epoch) spent in steps that were kept."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def update(self, message: Mapping[str, Any], now: float) -> float:
        """Return the share up to `now`. A message has the seconds of its stage's kept steps over all submissions."""
        stage = message["stage"]
        self._first.setdefault(stage, message["seconds"])
        self._last[stage] = message["seconds"]
        kept = sum(last - self._first[stage] for stage, last in self._last.items())
        return min(1.0, max(0.0, kept / max(now - self._start, 1e-9)))


def _seconds(time_iso: str) -> float:
    return datetime.datetime.fromisoformat(time_iso).timestamp()
