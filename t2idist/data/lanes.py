"""One group's way through its windows, with no more in memory than one window and a little."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from t2idist.data.order import Order, SampleRange, WindowSlice
from t2idist.data.reader import Bad, Encoded, ShardReader

READ_SAMPLES = 128
"""What one request reads, at most."""


class Lane:
    """One group's windows: the samples of the one in use that are left, and reads of the next as those are used up.

    ahead: samples that may be held besides one window's.
    """

    def __init__(self, number: int, order: Order, reader: ShardReader, pool: ThreadPoolExecutor, ahead: int) -> None:
        self._number = number
        self._order = order
        self._reader = reader
        self._pool = pool
        self._ahead = ahead
        self._window: tuple[int, int] | None = None
        self._samples: dict[int, Encoded | Bad] = {}
        self._next: tuple[int, int] | None = None
        self._unread: deque[SampleRange] = deque()
        self._reads: deque[Future[list[Encoded | Bad]]] = deque()
        self._started = 0

    def take(self, piece: WindowSlice) -> list[Encoded | Bad]:
        """The samples at the piece's places, which are forgotten here."""
        window = (piece.epoch, piece.number)
        places = self._order.window(piece.epoch, self._number, piece.number).permutation
        if window != self._window:
            if window != self._next:
                self._plan(window)
            self._start(len(places))
            self._samples = dict(enumerate(self._read()))
            for i in places[: piece.start]:  # the run begins in mid-window
                del self._samples[int(i)]
            self._window = window
            self._plan(self._after(window))
        end = piece.start + piece.count
        self._start(end + self._order.window_samples - len(places) + self._ahead)
        return [self._samples.pop(int(i)) for i in places[piece.start : end]]

    def _plan(self, window: tuple[int, int]) -> None:
        """Make `window` the next one; nothing of it is read yet."""
        self._next = window
        runs = self._order.window(window[0], self._number, window[1]).runs
        self._unread = deque(part for run in runs for part in _short_runs(run))
        self._started = 0

    def _start(self, samples: int) -> None:
        """Start reads of the next window until they make up at least so many of its samples."""
        while self._unread and self._started < samples:
            run = self._unread.popleft()
            self._started += run.count
            self._reads.append(self._pool.submit(self._reader.read, run))

    def _read(self) -> Iterator[Encoded | Bad]:
        while self._reads:
            yield from self._reads.popleft().result()

    def _after(self, window: tuple[int, int]) -> tuple[int, int]:
        epoch, number = window[0], window[1] + 1
        while number >= self._order.lane_windows(epoch, self._number):  # a lane may have nothing in a tiny epoch
            epoch, number = epoch + 1, 0
        return epoch, number


def _short_runs(run: SampleRange) -> Iterator[SampleRange]:
    """The run in pieces of what one request reads."""
    for first in range(0, run.count, READ_SAMPLES):
        yield SampleRange(run.shard, run.first + first, min(READ_SAMPLES, run.count - first))
