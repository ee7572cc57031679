"""The queue: turns, limits, clients that leave, and errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
import torch

from t2idist.contract import Captions, Sample
from t2idist.serve.packing import Packing, Row
from t2idist.serve.queue import DrawQueue, FullQueue

CAPTION = Captions(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64), torch.zeros(1, 0))


class Recorder:
    """Draws images whose one pixel is 100 * seed + position, and notes its batches. `go` lets it draw."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None

    def __call__(self, rows: Sequence[Row]) -> Sample:
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        values = [100 * row.seed + row.position for row in rows]
        self.batches.append(values)
        return Sample((torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1),))


def rows(seed: int, count: int) -> list[Row]:
    return [Row(CAPTION, seed, position, float("inf")) for position in range(count)]


def values(sample: Sample) -> list[int]:
    return [int(value) for value in sample.images[0].flatten()]


async def draw_together(queue: DrawQueue, recorder: Recorder, *counts: int) -> list[list[int]]:
    """Draw requests that all wait while another is drawn."""
    recorder.go.clear()
    first = asyncio.create_task(queue.draw(rows(9, 1)))
    await asyncio.sleep(0.05)
    tasks = [asyncio.create_task(queue.draw(rows(seed, count))) for seed, count in enumerate(counts, start=1)]
    await asyncio.sleep(0)
    recorder.go.set()
    assert values(await first) == [900]
    return [values(sample) for sample in await asyncio.gather(*tasks)]


@pytest.mark.parametrize("packing", list(Packing))
def test_every_request_gets_its_own_images_in_order(packing: Packing) -> None:
    recorder = Recorder()
    queue = DrawQueue(recorder, 4, packing, 100)
    drawn = asyncio.run(draw_together(queue, recorder, 1, 6, 3, 9))
    assert drawn == [[100 * seed + i for i in range(n)] for seed, n in ((1, 1), (2, 6), (3, 3), (4, 9))]
    assert all(len(batch) == 4 for batch in recorder.batches) and queue.waiting == 0
    if packing is Packing.ANY_ROW:
        assert len(recorder.batches) == 1 + 5, "19 images fill five batches"
    if packing is not Packing.ANY_ROW:
        for batch in recorder.batches:
            used = {value for value in batch if batch.count(value) == 1}
            assert all(value % 100 % 4 == batch.index(value) for value in used)
    if packing is Packing.ALONE:
        for batch in recorder.batches:
            assert len({value // 100 for value in batch}) == 1
            assert [value % 100 for value in batch] == list(range(batch[0] % 100, batch[0] % 100 + 4))


def test_a_large_request_does_not_hold_up_a_small_one() -> None:
    recorder = Recorder()
    asyncio.run(draw_together(DrawQueue(recorder, 4, Packing.ANY_ROW, 200), recorder, 100, 1))
    (place,) = [i for i, batch in enumerate(recorder.batches) if 200 in batch]
    assert place <= 2 < len(recorder.batches) - 10


def test_calls_take_turns_with_batches() -> None:
    recorder = Recorder()
    queue = DrawQueue(recorder, 4, Packing.ANY_ROW, 100)

    async def run() -> None:
        called: list[int] = []
        recorder.go.clear()
        work = [
            queue.draw(rows(1, 40)),
            queue.call(lambda: called.append(len(recorder.batches))),
            queue.draw(rows(2, 1)),
        ]
        tasks = [asyncio.create_task(each) for each in work]
        await asyncio.sleep(0.05)
        recorder.go.set()
        await asyncio.gather(*tasks)
        assert called[0] <= 2

    asyncio.run(run())


def test_a_full_queue_refuses_and_has_room_again() -> None:
    recorder = Recorder()
    queue = DrawQueue(recorder, 4, Packing.ANY_ROW, 8)

    async def run() -> None:
        recorder.go.clear()
        first = asyncio.create_task(queue.draw(rows(1, 6)))
        await asyncio.sleep(0.05)
        with pytest.raises(FullQueue, match="the queue is full: 6 images wait, of at most 8; try again"):
            await queue.draw(rows(2, 3))
        second = asyncio.create_task(queue.draw(rows(3, 2)))
        await asyncio.sleep(0)
        recorder.go.set()
        assert values(await first) == [100, 101, 102, 103, 104, 105]
        assert values(await second) == [300, 301]
        assert values(await queue.draw(rows(4, 8))) == list(range(400, 408))

    asyncio.run(run())


def test_images_of_a_client_that_left_are_not_drawn() -> None:
    recorder = Recorder()
    queue = DrawQueue(recorder, 4, Packing.ANY_ROW, 100)

    async def run() -> None:
        recorder.go.clear()
        leaving = asyncio.create_task(queue.draw(rows(1, 50)))
        staying = asyncio.create_task(queue.draw(rows(2, 2)))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.sleep(0)
        assert queue.waiting == 2
        recorder.go.set()
        assert values(await staying) == [200, 201]

    asyncio.run(run())
    assert len(recorder.batches) <= 2 and queue.waiting == 0


def test_an_error_reaches_the_requests_of_its_batch_and_is_remembered() -> None:
    recorder = Recorder()
    queue = DrawQueue(recorder, 4, Packing.ANY_ROW, 100)

    async def run() -> None:
        recorder.error = ValueError("of a request")
        with pytest.raises(ValueError):
            await queue.draw(rows(1, 9))
        assert queue.failure is None and queue.waiting == 0
        recorder.error = RuntimeError("of the device")
        with pytest.raises(RuntimeError, match="of the device"):
            await queue.draw(rows(1, 9))
        assert isinstance(queue.failure, RuntimeError)
        recorder.error = None
        assert values(await queue.draw(rows(3, 1))) == [300]

    asyncio.run(run())
