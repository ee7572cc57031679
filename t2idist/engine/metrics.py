"""What a run tells: metrics.jsonl, TensorBoard events and progress.json of a stage. Only the first worker writes."""

from __future__ import annotations

import datetime
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2idist import storage

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class MetricLogger:
    """The record of one stage on the first worker.

    Lines that a dead attempt wrote after the checkpoint that this one resumes from are dropped, so each number of
    images stands once. `facts` are fixed values of every progress message (run, stage, workers, restarts...).
    `watch` is called with each progress message.
    """

    def __init__(
        self,
        run_url: str,
        stage: str,
        *,
        images: int,
        step: int,
        budget_images: int,
        facts: Mapping[str, Any],
        watch: Callable[[dict[str, Any]], None] | None,
        progress_every_seconds: float = 2.0,
    ) -> None:
        self.run_url, self.url = run_url, storage.join(run_url, stage)
        self.images, self.budget_images = images, budget_images
        self.facts, self.watch, self.progress_every_seconds = facts, watch, progress_every_seconds
        self.lines = [line for line in read_metrics(self.url) if line["images"] <= images]
        self.seconds_before = float(self.lines[-1]["seconds"]) if self.lines else 0.0
        self._stored = len(self.lines)
        self.losses: dict[str, float] = {}
        self.values: dict[str, float] = {}
        self._events = _Events(self.url, step)
        self._started = self._told = self._written = time.monotonic()
        self._start_images = images
        self._window = (self._started, images)
        self._rate = 0.0

    def stepped(self, images: int) -> None:
        """Called after every step: tells progress when it is time."""
        self.images = images
        if time.monotonic() - self._told >= self.progress_every_seconds:
            self.tell("training")

    def add(self, losses: Mapping[str, float], others: Mapping[str, float], step: int) -> None:
        """One line of metrics at the present number of images."""
        moment = time.monotonic()
        start, images = self._window
        self._rate = (self.images - images) / max(moment - start, 1e-9)
        self._window = (moment, self.images)
        self.losses, self.values = dict(losses), dict(others)
        values = {**losses, **others}
        line = {
            "images": self.images,
            "step": step,
            "seconds": round(self.seconds_before + moment - self._started, 3),
            "images_per_second": round(self._rate, 2),
            "restarts": self.facts["restarts"],
            "time": now(),
            **values,
        }
        self.lines.append(line)
        self._events.add({**values, "speed/images_per_second": self._rate}, self.images)
        if moment - self._written >= 20:
            self.flush()

    def note(self, values: Mapping[str, float]) -> None:
        """Measured values (``val/...``) that join the newest line."""
        if self.lines and self.lines[-1]["images"] == self.images:
            self.lines[-1].update(values)
        else:
            self.lines.append({"images": self.images, "time": now(), "seconds": self._seconds(), **values})
        self._events.add(values, self.images)

    def pause(self, seconds: float) -> None:
        """Time that was not training (pictures, checkpoints) does not count against images per second."""
        start, images = self._window
        self._window = (start + seconds, images)

    def flush(self) -> None:
        """Put everything where others see it."""
        self._written = time.monotonic()
        data = "".join(json.dumps(line) + "\n" for line in self.lines).encode()
        storage.write_bytes(storage.join(self.url, "metrics.jsonl"), data)
        self._stored = len(self.lines)
        self._events.flush()

    def unwritten(self) -> list[dict[str, Any]]:
        """Lines that are not stored yet."""
        return self.lines[self._stored :]

    def tell(self, state: str) -> None:
        """Write progress.json and call `watch`."""
        self._told = time.monotonic()
        average = (self.images - self._start_images) / max(self._told - self._started, 1e-9)
        rate = self._rate or average
        message = {
            **self.facts,
            "images": self.images,
            "budget_images": self.budget_images,
            "images_per_second": round(rate, 2),
            "seconds_left": round((self.budget_images - self.images) / average) if average > 0 else None,
            "seconds": self._seconds(),
            "losses": self.losses,
            "values": self.values,
            "state": state,
            "time": now(),
        }
        storage.write_json(storage.join(self.run_url, PROGRESS), message)
        if self.watch is not None:
            self.watch(message)

    def close(self) -> None:
        self.flush()
        self._events.close()

    def _seconds(self) -> float:
        return round(self.seconds_before + time.monotonic() - self._started, 3)


def read_metrics(stage_url: str) -> list[dict[str, Any]]:
    """The metric lines of a stage so far; a last line that was cut is left out."""
    try:
        text = storage.read_bytes(storage.join(stage_url, "metrics.jsonl")).decode()
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def append_lines(stage_url: str, lines: Sequence[dict[str, Any]]) -> None:
    """Store lines that come after those that are there; the rest are there already."""
    stored = read_metrics(stage_url)
    last = stored[-1]["images"] if stored else -1
    data = "".join(json.dumps(line) + "\n" for line in [*stored, *(line for line in lines if line["images"] > last)])
    storage.write_bytes(storage.join(stage_url, "metrics.jsonl"), data.encode())


class _Events:
    """TensorBoard events: straight into a local run folder, or by way of a temporary one into an object store.

    They end with a warning where they cannot be written (a full disk, say): metrics.jsonl has all that is in them.
    """

    def __init__(self, stage_url: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._target = storage.join(stage_url, "events")
        local = storage.local_path(self._target)
        self._temporary = None if local is not None else tempfile.TemporaryDirectory(prefix="t2idist-events-")
        self._folder = local if local is not None else Path(self._temporary.name)  # type: ignore[union-attr]
        self._writer = SummaryWriter(str(self._folder), purge_step=step or None)  # type: ignore[no-untyped-call]
        self._ended = False

    def add(self, values: Mapping[str, float], images: int) -> None:
        def write() -> None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, images)  # type: ignore[no-untyped-call]

        self._or_end(write)

    def flush(self) -> None:
        self._or_end(self._writer.flush)
        self._or_end(self._upload)

    def close(self) -> None:
        self._or_end(self._writer.close)
        self._or_end(self._upload)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _upload(self) -> None:
        if self._temporary is not None:
            for file in self._folder.iterdir():
                storage.write_bytes(storage.join(self._target, file.name), file.read_bytes())

    def _or_end(self, work: Callable[[], None]) -> None:
        if self._ended:
            return
        try:
            work()
        except OSError as error:
            self._ended = True
            logger.warning("TensorBoard events end here: %s", error)
