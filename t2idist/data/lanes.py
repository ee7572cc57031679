"""The sample stream of one group, which holds little more than one window in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from t2idist.data.order import Order, SampleRange, WindowSlice
from t2idist.data.reader import ShardReader
from t2idist.data.samples import Sample

READ_SAMPLES = 128
"""The largest number of samples in one read request."""


class Lane:
    """Read the windows of one lane in order, each in the background while the one before it is consumed.

    Args:
        lane: Index of the lane, which is the index of its group.
        order: Order of the run.
        reader: Reads ranges of samples.
        pool: Threads that run the reads.
        ahead: Number of samples that may be held in addition to one window.
    """

    def __init__(self, lane: int, order: Order, reader: ShardReader, pool: ThreadPoolExecutor, ahead: int) -> None:
        self._lane = lane
        self._order = order
        self._reader = reader
        self._pool = pool
        self._ahead = ahead
        self._current: tuple[int, int] | None = None  # (epoch, window)
        self._samples: dict[int, Sample] = {}
        self._next: tuple[int, int] | None = None
        self._unread: deque[SampleRange] = deque()
        self._reads: deque[Future[list[Sample]]] = deque()
        self._requested = 0

    def pop(self, part: WindowSlice) -> list[Sample]:
        """Return the samples of a slice, in order, and drop them from memory. Slices must come in order."""
        window = (part.epoch, part.window)
        positions = self._order.window(part.epoch, self._lane, part.window).permutation
        if window != self._current:
            if window != self._next:
                self._schedule(window)
            self._request(len(positions))
            self._samples = dict(enumerate(self._await_reads()))
            for i in positions[: part.start]:  # the run resumes within this window
                del self._samples[int(i)]
            self._current = window
            self._schedule(self._following(window))
        end = part.start + part.count
        self._request(end + self._order.window_samples - len(positions) + self._ahead)
        return [self._samples.pop(int(i)) for i in positions[part.start : end]]

    def _schedule(self, window: tuple[int, int]) -> None:
        """Make `window` the next one to read, without requesting any of it yet."""
        self._next = window
        ranges = self._order.window(window[0], self._lane, window[1]).ranges
        self._unread = deque(request for samples in ranges for request in _split_range(samples))
        self._requested = 0

    def _request(self, samples: int) -> None:
        """Submit reads of the next window until at least `samples` of its samples are requested."""
        while self._unread and self._requested < samples:
            request = self._unread.popleft()
            self._requested += request.count
            self._reads.append(self._pool.submit(self._reader.read, request))

    def _await_reads(self) -> Iterator[Sample]:
        while self._reads:
            yield from self._reads.popleft().result()

    def _following(self, window: tuple[int, int]) -> tuple[int, int]:
        epoch, index = window[0], window[1] + 1
        while index >= self._order.lane_windows(epoch, self._lane):  # a lane may have no sample of a tiny epoch
            epoch, index = epoch + 1, 0
        return epoch, index


def _split_range(samples: SampleRange) -> Iterator[SampleRange]:
    """Split a range into read requests."""
    for first in range(0, samples.count, READ_SAMPLES):
        yield SampleRange(samples.shard, samples.first + first, min(READ_SAMPLES, samples.count - first))
