"""The queue in front of the networks: images of many requests, drawn a batch at a time, in turns."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from t2idist.contract import Sample
from t2idist.serve.packing import Packing, Row, fill

T = TypeVar("T")


class FullQueue(Exception):
    """Raised for a request that does not fit into the queue."""


class _Request:
    """Images of one request that are still to be drawn, or one call that runs by itself."""

    def __init__(self, rows: Sequence[Row], call: Callable[[], object] | None, cost: int) -> None:
        self.pending = deque(range(len(rows)))
        self.rows, self.call, self.cost = rows, call, cost
        self.drawn: list[tuple[Sample, int] | None] = [None] * len(rows)
        self.missing = len(rows)
        self.future: asyncio.Future[object] = asyncio.get_running_loop().create_future()


class DrawQueue:
    """Runs one batch, or one call, at a time in a thread of its own.

    While a batch is drawn, others wait; the next batch takes one image of each request in turn, as far as the packing
    allows, until it is full. So a batch never waits for requests, and a large request does not hold up a small one.

    Args:
        draw: draws a full batch; called in the thread.
        size: images in a batch.
        packing: which rows an image may be drawn in.
        limit: images that may wait.
    """

    def __init__(self, draw: Callable[[Sequence[Row]], Sample], size: int, packing: Packing, limit: int) -> None:
        self._draw, self._size, self._packing = draw, size, packing
        self.limit = limit
        self._requests: deque[_Request] = deque()
        self._thread = ThreadPoolExecutor(1, "draw")
        self._task: asyncio.Task[None] | None = None
        self._busy_since: float | None = None
        self.waiting = 0
        """Images that are not drawn yet."""
        self.batches = 0
        self.failure: BaseException | None = None
        """The first error that was not the fault of a request."""

    async def draw(self, rows: Sequence[Row]) -> Sample:
        """Draw these rows, the images 0, 1, ... of one sentence. Raises FullQueue."""
        count = len(rows)
        if self._packing is Packing.ALONE and count % self._size:
            first = rows[0]
            extra = range(count, count + self._size - count % self._size)
            rows = [*rows, *(Row(first.captions, first.seed, i, first.truncation) for i in extra)]
        request = _Request(rows, None, count)
        await self._wait_for(request)
        samples = [drawn for drawn in request.drawn if drawn is not None][:count]
        images = zip(*([x[row] for x in sample.images] for sample, row in samples), strict=True)
        maps = zip(*([x[row] for x in sample.attention] for sample, row in samples), strict=True)
        return Sample(_stack(images), _stack(maps))

    async def call(self, function: Callable[[], T], cost: int = 1) -> T:
        """Call a function in the thread when it is its turn; it counts as `cost` images. Raises FullQueue."""
        request = _Request((), function, cost)
        result: T = await self._wait_for(request)  # type: ignore[assignment]
        return result

    def busy_seconds(self) -> float:
        """Return for how long the batch has been drawn that is drawn now."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _wait_for(self, request: _Request) -> object:
        if self.waiting + request.cost > self.limit:
            raise FullQueue(
                f"the queue is full: {self.waiting} images wait, of at most {self.limit}; try again in a few seconds"
            )
        self.waiting += request.cost
        self._requests.append(request)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            return await request.future
        finally:
            self.waiting -= request.cost
            if request in self._requests:  # the client has left
                self._requests.remove(request)

    async def _run(self) -> None:
        """Draw until nothing waits."""
        while self._requests:
            if (call := self._requests[0].call) is not None:
                await self._run_call(self._requests.popleft(), call)
            else:
                await self._run_batch()

    async def _in_thread(self, function: Callable[[], T]) -> T:
        self._busy_since = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function)
        finally:
            self._busy_since = None

    async def _run_call(self, request: _Request, call: Callable[[], object]) -> None:
        try:
            result = await self._in_thread(call)
        except Exception as error:  # whatever it is, the request gets it, and the queue goes on
            self._fail([request], error)
        else:
            _finish(request, result)

    async def _run_batch(self) -> None:
        batch = self._next_batch()
        rows = [None if place is None else place[0].rows[place[1]] for place in batch]
        try:
            sample = await self._in_thread(lambda: self._draw(fill(rows)))
        except Exception as error:  # as above
            self._fail([place[0] for place in batch if place is not None], error)
            return
        self.batches += 1
        for row, place in enumerate(batch):
            if place is not None:
                request, index = place
                request.drawn[index] = sample, row
                request.missing -= 1
                if not request.missing:
                    _finish(request, None)

    def _next_batch(self) -> list[tuple[_Request, int] | None]:
        """Take images from the requests in turn; those with images left go to the end of the queue."""
        batch: list[tuple[_Request, int] | None] = [None] * self._size
        for _ in range(len(self._requests)):
            request = self._requests[0]
            if request.call is not None or None not in batch:
                break
            self._requests.popleft()
            self._place(request, batch)
            if request.pending:
                self._requests.append(request)
            if self._packing is Packing.ALONE:
                break
        return batch

    def _place(self, request: _Request, batch: list[tuple[_Request, int] | None]) -> None:
        """Put images of a request into the rows of a batch that are free."""
        kept: deque[int] = deque()
        while request.pending and None in batch:
            index = request.pending.popleft()
            row = batch.index(None) if self._packing is Packing.ANY_ROW else index % self._size
            if batch[row] is None:
                batch[row] = request, index
            else:
                kept.append(index)
        request.pending.extendleft(reversed(kept))

    def _fail(self, requests: Sequence[_Request], error: Exception) -> None:
        if not isinstance(error, ValueError) and self.failure is None:
            self.failure = error
        for request in requests:
            if request in self._requests:
                self._requests.remove(request)
            if not request.future.done():
                request.future.set_exception(error)


def _finish(request: _Request, result: object) -> None:
    if not request.future.done():
        request.future.set_result(result)


def _stack(scales: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(scale) for scale in scales)
