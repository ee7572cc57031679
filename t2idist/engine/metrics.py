"""The records of a stage: metrics.jsonl, progress.json and trackers. Only the first worker writes them."""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from t2idist import storage
from t2idist.observability.tracking import STOPPED, Tracker, numbers

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class MetricLogger:
    """Writes the metrics and the progress of one stage.

    Lines that an earlier attempt wrote after the checkpoint from which this one resumes are dropped, so that each image
    count occurs once.

    Args:
        images: images seen so far.
        step: steps done so far.
        metadata: constant values of every progress message (run, stage, workers, restarts, ...).
        on_progress: called with each progress message.
        started: when the training began, as `time.monotonic()` (None: now).
        trackers: get the metrics and sample images, as TensorBoard does; ended by `close`.
    """

    def __init__(
        self,
        run_url: str,
        stage: str,
        *,
        images: int,
        step: int,
        budget_images: int,
        metadata: dict[str, Any],
        on_progress: Callable[[dict[str, Any]], None] | None,
        progress_every_seconds: float = 2.0,
        started: float | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.run_url, self.url = run_url, storage.join(run_url, stage)
        self.images, self.budget_images = images, budget_images
        self.metadata, self.on_progress, self.progress_every_seconds = metadata, on_progress, progress_every_seconds
        self.lines = [line for line in read_metrics(self.url) if line["images"] <= images]
        self.seconds_before = float(self.lines[-1]["seconds"]) if self.lines else 0.0
        self._stored = len(self.lines)
        self.losses: dict[str, float] = {}
        self.values: dict[str, float] = {}
        self._trackers: tuple[Tracker, ...] = (TensorBoard(self.url, step), *trackers)
        for tracker in self._trackers:
            tracker.earlier(tuple(self.lines))
        self._reported = self._flushed = time.monotonic()
        self._started = self._reported if started is None else started
        self._start_images = images
        self._window = (self._started, images)
        self._rate = 0.0

    def log_step(self, images: int) -> None:
        """Count a step, and report progress if the last report is long enough ago."""
        self.images = images
        if time.monotonic() - self._reported >= self.progress_every_seconds:
            self.log_state("training")

    def log_metrics(self, losses: Mapping[str, float], others: Mapping[str, float], step: int) -> None:
        """Add a line of metrics at the current image count."""
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
            "restarts": self.metadata["restarts"],
            "time": now(),
            **values,
        }
        self.lines.append(line)
        for tracker in self._trackers:
            tracker.metrics(self.images, numbers(line), line["time"])
        if moment - self._flushed >= 20:
            self.flush()

    def log_values(self, values: Mapping[str, float]) -> None:
        """Add values of an evaluation (``val/...``) to the line of the current image count."""
        if self.lines and self.lines[-1]["images"] == self.images:
            self.lines[-1].update(values)
        else:
            self.lines.append({"images": self.images, "time": now(), "seconds": self._seconds(), **values})
        for tracker in self._trackers:
            tracker.metrics(self.images, values, self.lines[-1]["time"])

    def log_pictures(self, images_seen: int, urls: Sequence[str]) -> None:
        """Hand sample images to the trackers, by the URLs of their PNG files."""
        for tracker in self._trackers:
            tracker.pictures(images_seen, urls)

    def log_scores(self, images_seen: int, scores: Mapping[str, float]) -> None:
        """Hand the scores of the weights at an image count to the trackers, as ``scores/...``, from any thread."""
        values = {f"scores/{name}": value for name, value in scores.items()}
        for tracker in self._trackers:
            tracker.metrics(images_seen, values, now())

    def exclude_seconds(self, seconds: float) -> None:
        """Leave time that was not training (evaluation, checkpoints) out of the images per second."""
        start, images = self._window
        self._window = (start + seconds, images)

    def flush(self) -> None:
        """Write all lines and events to storage."""
        self._flushed = time.monotonic()
        data = "".join(json.dumps(line) + "\n" for line in self.lines).encode()
        storage.write_bytes(storage.join(self.url, "metrics.jsonl"), data)
        self._stored = len(self.lines)
        for tracker in self._trackers:
            tracker.flush()

    def unwritten(self) -> list[dict[str, Any]]:
        """Return the lines that are not in storage yet."""
        return self.lines[self._stored :]

    def log_state(self, state: str) -> None:
        """Write progress.json with this state ("training", "stopped", "done") and call `on_progress`."""
        self._reported = time.monotonic()
        average = (self.images - self._start_images) / max(self._reported - self._started, 1e-9)
        rate = self._rate or average
        message = {
            **self.metadata,
            "images": self.images,
            "budget_images": self.budget_images,
            "images_per_second": round(rate, 2),
            "seconds_left": round((self.budget_images - self.images) / average) if average > 0 else None,
            "seconds": self._seconds(),
            "losses": self.losses,
            "values": self.values,
            "state": state,
            "time": now(),
            "process": {"host": socket.gethostname(), "pid": os.getpid()},
        }
        storage.write_json(storage.join(self.run_url, PROGRESS), message)
        if self.on_progress is not None:
            self.on_progress(message)

    def close(self, state: str = STOPPED) -> None:
        """Write all that is left, and end the trackers as `DONE`, `STOPPED` or `FAILED`."""
        try:
            self.flush()
        finally:
            with ThreadPoolExecutor(len(self._trackers)) as pool:  # each may wait for its server
                list(pool.map(lambda tracker: tracker.end(state), self._trackers))

    def _seconds(self) -> float:
        return round(self.seconds_before + time.monotonic() - self._started, 3)


def read_metrics(stage_url: str) -> list[dict[str, Any]]:
    """Read the metric lines of a stage, up to a line that was cut off."""
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
    """Append the lines whose image count is larger than that of the last stored line."""
    stored = read_metrics(stage_url)
    last = stored[-1]["images"] if stored else -1
    data = "".join(json.dumps(line) + "\n" for line in [*stored, *(line for line in lines if line["images"] > last)])
    storage.write_bytes(storage.join(stage_url, "metrics.jsonl"), data.encode())


class TensorBoard:
    """TensorBoard events, written to a local run folder, or by way of a temporary one to an object store.

    If they cannot be written (the disk is full, say), they stop with a warning: metrics.jsonl has the same values.
    """

    def __init__(self, stage_url: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._target = storage.join(stage_url, "events")
        local = storage.local_path(self._target)
        self._temporary = None if local is not None else tempfile.TemporaryDirectory(prefix="t2idist-events-")
        self._folder = local if local is not None else Path(self._temporary.name)  # type: ignore[union-attr]
        self._writer = SummaryWriter(str(self._folder), purge_step=step or None)  # type: ignore[no-untyped-call]
        self._stopped = False

    def earlier(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing: the events of earlier attempts are in the same folder."""

    def metrics(self, images_seen: int, values: Mapping[str, float], time_iso: str) -> None:
        def write() -> None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, images_seen)  # type: ignore[no-untyped-call]

        self._or_stop(write)

    def pictures(self, images_seen: int, urls: Sequence[str]) -> None:
        """Do nothing: the sample images are in the run folder."""

    def flush(self) -> None:
        self._or_stop(self._writer.flush)
        self._or_stop(self._upload)

    def end(self, state: str) -> None:
        self._or_stop(self._writer.close)
        self._or_stop(self._upload)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _upload(self) -> None:
        if self._temporary is not None:
            for file in self._folder.iterdir():
                storage.write_bytes(storage.join(self._target, file.name), file.read_bytes())

    def _or_stop(self, write: Callable[[], None]) -> None:
        if self._stopped:
            return
        try:
            write()
        except OSError as error:
            self._stopped = True
            logger.warning("TensorBoard events stop here: %s", error)
