"""Trackers: what gets the records of a stage besides metrics.jsonl. A slow or absent one costs no step.

`Tracker` is the interface. TensorBoard (engine/metrics.py) implements it directly, because it writes files; services
on a network (MLflow, W&B) do so through `BackgroundTracker`, which has a thread and a queue of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from t2idist.observability.logs import redact_secrets

logger = logging.getLogger(__name__)

END_SECONDS = 8.0
"""Wait at most this long for the last deliveries of a stage."""
POINTS_AT_ONCE = 30
DONE, STOPPED, FAILED = "done", "stopped", "failed"
"""How an attempt at a stage ends."""


class Tracker(Protocol):
    """Gets the records of one attempt at a stage, in the order of images seen."""

    def earlier(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Take the lines of metrics.jsonl up to the state from which this attempt resumes; comes first, if at all."""
        ...

    def metrics(self, images_seen: int, values: Mapping[str, float], time_iso: str) -> None: ...

    def pictures(self, images_seen: int, urls: Sequence[str]) -> None:
        """Take sample images, by the URLs of their PNG files."""
        ...

    def flush(self) -> None: ...

    def end(self, state: str) -> None:
        """End the attempt as `DONE`, `STOPPED` or `FAILED`."""
        ...


@dataclass(frozen=True)
class Point:
    """The metrics at a number of images seen."""

    images_seen: int
    values: Mapping[str, float]
    time_iso: str


class Refused(Exception):
    """The service does not take a record, and would not if it were sent again."""


class Service(Protocol):
    """A tracking service on a network. Its calls may take long, and raise any error."""

    name: str
    target: str
    """Where the tracker's run is, for example the address of the server."""
    ignores_repeats: bool
    """Whether a point that is sent twice, with the same time, is kept once."""
    durable_seconds: float
    """How long after a call a point may still be lost with this process."""

    def open(self, run_id: str | None) -> str:
        """Continue the tracker's run with this id, or create one if there is none; return its id."""
        ...

    def describe(self) -> None:
        """Send the configuration and the commit."""
        ...

    def metrics(self, points: Sequence[Point]) -> None:
        """Send at most `POINTS_AT_ONCE` points."""
        ...

    def picture(self, images_seen: int, url: str) -> None: ...

    def end(self, state: str) -> None: ...


@dataclass(frozen=True)
class Position:
    """How far a tracker's run has got: kept with the stage, so that another process continues it."""

    target: str
    run_id: str
    images: int = -1
    """Images seen at the last point that was delivered."""


class PositionStore(Protocol):
    """Keeps the position of one tracker."""

    def load(self) -> Position | None: ...

    def save(self, position: Position) -> None: ...


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a line of metrics.jsonl, without the time and the count of images."""
    others = ("images", "step", "seconds", "restarts", "time")
    values = {name: float(v) for name, v in line.items() if name not in others and isinstance(v, int | float)}
    if (speed := values.pop("images_per_second", None)) is not None:
        values["speed/images_per_second"] = speed
    return values


class BackgroundTracker:
    """Delivers records to a service from a thread of its own.

    A delivery that fails is repeated until it succeeds or the attempt ends; meanwhile records wait in a queue, which
    drops its oldest. Each outage is one warning. What an attempt could not deliver, the next one takes from
    metrics.jsonl.

    Args:
        service: where to deliver.
        store: keeps the position.
        queue_length: records that wait at most.
        stalled_seconds: warn if one delivery takes longer.
        end_seconds: wait at most this long for the last deliveries.
        retry_seconds: wait between two attempts at a delivery; doubled after each, up to a minute.
    """

    def __init__(
        self,
        service: Service,
        store: PositionStore,
        *,
        queue_length: int = 1000,
        stalled_seconds: float = 30.0,
        end_seconds: float = END_SECONDS,
        retry_seconds: float = 5.0,
    ) -> None:
        self._service, self._store = service, store
        self._queue_length, self._stalled_seconds = queue_length, stalled_seconds
        self._end_seconds, self._retry_seconds = end_seconds, retry_seconds
        self._queue: deque[Point | Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._ending = self._abandoned = self._warned = self._dropped = False
        self._busy_since: float | None = None
        self._position: Position | None = None
        self._newest = -1
        """Images seen at the newest point that was handed over."""
        self._handed_over: deque[tuple[float, int]] = deque()
        self._thread = threading.Thread(target=self._work, name=f"{service.name} tracker", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ called by the training loop
    def earlier(self, lines: Sequence[Mapping[str, Any]]) -> None:
        def deliver() -> None:
            assert self._position is not None
            first = self._position.images + (not self._service.ignores_repeats)
            missing = [Point(line["images"], numbers(line), line["time"]) for line in lines if line["images"] >= first]
            for i in range(0, len(missing), POINTS_AT_ONCE):
                self._deliver_points(missing[i : i + POINTS_AT_ONCE])

        self._put(deliver)

    def metrics(self, images_seen: int, values: Mapping[str, float], time_iso: str) -> None:
        self._warn_if_stalled()
        self._put(Point(images_seen, dict(values), time_iso))

    def pictures(self, images_seen: int, urls: Sequence[str]) -> None:
        for url in urls:
            self._put(lambda url=url: self._service.picture(images_seen, url))  # type: ignore[misc]

    def flush(self) -> None:
        """Do nothing: records are delivered at once."""

    def end(self, state: str) -> None:
        """End the tracker's run; wait for deliveries, but not long, and hardly if they have failed before."""
        self._put(lambda: self._end_run(state))
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(self._end_seconds / 5 if self._warned else self._end_seconds)
        with self._changed:
            self._abandoned, left = True, len(self._queue)
            self._changed.notify_all()
        if self._thread.is_alive():
            self._warn(f"has not answered at the end of the stage; {left} records are not delivered")

    @property
    def is_waiting(self) -> bool:
        """Whether the service has not answered yet."""
        return self._busy_since is not None

    def _put(self, record: Point | Callable[[], None]) -> None:
        with self._changed:
            self._queue.append(record)
            full = len(self._queue) > self._queue_length
            if full:
                self._queue.popleft()
            self._changed.notify_all()
        if full and not self._dropped:
            self._dropped = True
            logger.warning("%s: the oldest of %d waiting records are dropped", self._service.name, self._queue_length)

    def _warn_if_stalled(self) -> None:
        since = self._busy_since
        if since is not None and (seconds := time.monotonic() - since) > self._stalled_seconds:
            self._warn(f"has not answered for {seconds:.0f} s")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s %s; training goes on without it", self._service.name, text)

    # ------------------------------------------------------------ in the thread
    def _work(self) -> None:
        if not self._repeat(self._open):
            return
        while (deliver := self._next()) is not None:
            if not self._repeat(deliver):
                return

    def _next(self) -> Callable[[], None] | None:
        """Return how to deliver the next record, or the next points together; None after the last one."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ending or self._abandoned)
            if not self._queue or self._abandoned:
                return None
            points: list[Point] = []
            while self._queue and len(points) < POINTS_AT_ONCE and isinstance(record := self._queue[0], Point):
                points.append(record)
                self._queue.popleft()
            if points:
                return lambda: self._deliver_points(points)
            record = self._queue.popleft()
            assert not isinstance(record, Point)
            return record

    def _open(self) -> None:
        stored = self._store.load()
        known = stored.run_id if stored is not None and stored.target == self._service.target else None
        run_id = self._service.open(known)
        if self._abandoned:  # it has answered too late: another attempt has begun, perhaps with a run of its own
            return
        if stored is None or run_id != known:
            stored = Position(self._service.target, run_id)
            self._store.save(stored)
        self._position, self._newest = stored, stored.images
        self._service.describe()

    def _deliver_points(self, points: Sequence[Point]) -> None:
        if self._abandoned:  # perhaps another process or thread continues the tracker's run
            return
        self._service.metrics(points)
        self._newest = max(self._newest, *(point.images_seen for point in points))  # scores come later than metrics
        self._handed_over.append((time.monotonic(), self._newest))
        self._save_position(self._service.durable_seconds)

    def _save_position(self, older_than_seconds: float) -> None:
        """Save the position at the last point that was handed over so long ago."""
        images = None
        while self._handed_over and self._handed_over[0][0] <= time.monotonic() - older_than_seconds:
            images = self._handed_over.popleft()[1]
        if images is not None and self._position is not None and not self._abandoned:
            self._position = Position(self._position.target, self._position.run_id, images)
            self._store.save(self._position)

    def _end_run(self, state: str) -> None:
        self._service.end(state)
        self._save_position(0.0)

    def _repeat(self, deliver: Callable[[], None]) -> bool:
        """Deliver, again after failures; return whether to go on."""
        wait_seconds = self._retry_seconds
        while not self._abandoned:
            last = self._ending
            try:
                self._busy_since = time.monotonic()
                deliver()
            except Refused as error:
                self._warn(f"refuses a record: {_one_line(error)}")
                return True
            except Exception as error:  # the clients raise errors of their own and of their HTTP libraries
                self._warn(f"failed: {_one_line(error)}")
            else:
                self._warned = False
                return True
            finally:
                self._busy_since = None
            if last:
                return False
            with self._changed:
                self._changed.wait_for(lambda: self._ending or self._abandoned, wait_seconds)
            wait_seconds = min(2 * wait_seconds, 60.0)
        return False


def _one_line(error: Exception) -> str:
    return redact_secrets(" ".join(str(error).split())[:300] or type(error).__name__)
