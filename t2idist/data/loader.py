"""A worker's stream of batches, made off the training thread.

One thread walks the run's order and hands out work; a few threads read windows; `config.threads` threads decode, crop,
flip and resize. Every random choice depends on (seed, position in the run), never on a worker or a thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.contract import Batch
from t2idist.data import cores
from t2idist.data.cache import ShardCache
from t2idist.data.collate import BatchBuffer, RowTask, SampleTransform
from t2idist.data.lanes import READ_SAMPLES, Lane
from t2idist.data.order import Order, SampleRange, draws, permutation
from t2idist.data.reader import ShardReader
from t2idist.data.shards import Dataset

logger = logging.getLogger(__name__)

_READ_THREADS = 8
_DECODE_CHUNK = 8
_BATCHES_AHEAD = (2, 64)
_RUN_SAMPLES = 256


@dataclass(frozen=True)
class _Ticket:
    """A batch under way."""

    arrays: BatchBuffer
    work: list[Future[None]]


class Loader(Iterator[Batch]):
    """Endless batches of one worker's groups, from `step0` on: `next(loader)` is the batch of the next step.

    quarantine: samples that could not be used, by key, with the reason; the place of such a sample is filled by the
    good sample before it in its group (or the first good one), so that no other sample moves. samples_read, bad_reads:
    places of the batches so far, and those of them that were filled so. wait_seconds: how long `next` has waited in
    all. An exception in a thread is raised by `next`. `close` ends all threads.
    """

    def __init__(
        self, recipe: SampleTransform, reader: ShardReader, order: Order, config: DataConfig, sizes: Sequence[int],
        groups: Sequence[int], step0: int, training: bool,
    ) -> None:  # fmt: skip
        self.quarantine: dict[str, str] = {}
        self.samples_read = 0
        self.bad_reads = 0
        self.wait_seconds = 0.0
        self._recipe = recipe
        self._order = order
        self._sizes = tuple(sizes)
        self._groups = tuple(groups)
        self._step0 = step0
        self._training = training
        self._read_pool = ThreadPoolExecutor(_READ_THREADS, "read")
        self._decode_pool = cores.single_threaded_pool(config.threads, "decode")
        self._reader = reader
        budget_bytes = (config.prefetch_mib << 20) // 2  # half for samples as they are stored, half for batches
        ahead = max(READ_SAMPLES, budget_bytes // len(groups) // max(reader.mean_bytes, 1))
        self._lanes = {group: Lane(group, order, reader, self._read_pool, ahead) for group in groups}
        batch_bytes = recipe.arrays(1, sizes).bytes * order.group_size * len(groups)
        fewest, most = _BATCHES_AHEAD
        self._queue: queue.Queue[_Ticket | BaseException] = queue.Queue(
            max(fewest, min(most, budget_bytes // batch_bytes))
        )
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._produce, name="batches", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        if self._failure is not None:
            raise self._failure
        if self._closing.is_set():
            raise RuntimeError("this loader is closed")
        began = time.perf_counter()
        try:
            ticket = self._queue.get()
            if isinstance(ticket, BaseException):
                raise ticket
            for work in ticket.work:
                work.result()
            self._fill_gaps(ticket.arrays)
        except BaseException as error:
            self._failure = error
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - began
        return ticket.arrays.batch(len(self._groups))

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all threads; may be called more than once."""
        self._closing.set()
        self._reader.close()
        for pool in (self._read_pool, self._decode_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        self._thread.join()
        for pool in (self._read_pool, self._decode_pool):
            pool.shutdown(wait=True)

    def _fill_gaps(self, arrays: BatchBuffer) -> None:
        size = self._order.group_size
        self.samples_read += len(arrays.ids)
        self.bad_reads += len(arrays.bad)
        for row, reason in sorted(arrays.bad.items()):
            if arrays.ids[row] not in self.quarantine:
                logger.warning("sample %s is left out: %s", arrays.ids[row], reason)
            self.quarantine[arrays.ids[row]] = reason
        for row in sorted(arrays.bad):
            start = row - row % size
            good = [other for other in range(start, start + size) if other not in arrays.bad]
            if not good:
                names = ", ".join(arrays.ids[start : start + size][:5])
                raise ValueError(f"no sample of a group of {size} can be used (such as {names}): {arrays.bad[row]}")
            before = [other for other in good if other < row]
            arrays.copy_row(before[-1] if before else good[0], row)

    def _produce(self) -> None:
        step = self._step0
        try:
            while not self._closing.is_set():
                self._put(self._start(step))
                step += 1
        except BaseException as error:  # handed on to whoever waits for batches
            if not self._closing.is_set():
                self._put(error)

    def _put(self, item: _Ticket | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _start(self, step: int) -> _Ticket:
        size = self._order.group_size
        samples = size * len(self._groups)
        arrays = self._recipe.arrays(samples, self._sizes)
        work = []
        for number, group in enumerate(self._groups):
            indices = self._order.sample_index(step, group)
            random = draws(self._order.seed, self._order.position(step, group), size)
            encoded = [sample for piece in self._order.pieces(step, group) for sample in self._lanes[group].take(piece)]
            places = [
                RowTask(number * size + i, int(indices[i]), random[i] if self._training else None, encoded[i])
                for i in range(size)
            ]
            for first in range(0, size, _DECODE_CHUNK):
                chunk = places[first : first + _DECODE_CHUNK]
                work.append(self._decode_pool.submit(self._recipe.fill, arrays, chunk))
        return _Ticket(arrays, work)


def open_loader(
    dataset: Dataset,
    split: str,
    *,
    config: DataConfig,
    sizes: tuple[int, ...],
    groups: Sequence[int],
    total_groups: int,
    group_size: int,
    seed: int,
    step0: int,
    training: bool = True,
) -> Loader:
    """The batches of this worker's `groups` (of `total_groups`) from step `step0` on, groups in ascending order.

    sizes: of the pictures, lowest first. seed: of the run. training: random crop, mirroring, caption and words; else
    the centre and the first caption. Raises ValueError for sizes or groups that are not possible.
    """
    mine = sorted(set(groups))
    if not mine or mine[0] < 0 or mine[-1] >= total_groups or len(mine) != len(groups):
        raise ValueError(f"groups {list(groups)} of a worker: give at least one, each once, of 0 to {total_groups - 1}")
    _check_picture_sizes(sizes)
    of_split = dataset.split(split)
    order = Order(seed, of_split.shard_sizes, total_groups, group_size)
    attributes = _numbered(dataset.attribute_names)
    recipe = SampleTransform(
        of_split, dataset.vocabulary, attributes, config.max_words, config.crop, config.flip, dataset.vectors,
        config.vectors_mean_of,
    )  # fmt: skip
    reader = ShardReader(dataset, split, _cache(dataset, config))
    return Loader(recipe, reader, order, config, sizes, mine, step0, training)


def _cache(dataset: Dataset, config: DataConfig) -> ShardCache | None:
    if not config.cache_gib or storage.is_local(dataset.url):
        return None
    folder = Path(config.cache).expanduser() if config.cache else Path.home() / ".cache" / "t2idist"
    shards = [shard for of_split in dataset.splits.values() for shard in of_split.shards]
    limit_bytes = int(config.cache_gib * 2**30)
    return ShardCache(folder / "shards", limit_bytes, dataset.url, shards, endpoint_url=dataset.endpoint_url)


@dataclass(frozen=True)
class LoadedSplit:
    """Samples of a split in memory.

    batch: as one group, n samples in the order of the split, uint8 pictures. captions: all of each sample's.
    attributes: names of those that each sample has.
    """

    batch: Batch
    captions: tuple[tuple[str, ...], ...]
    attributes: tuple[tuple[str, ...], ...]


def load_split(
    dataset: Dataset,
    split: str,
    *,
    sizes: tuple[int, ...],
    max_words: int,
    limit: int | None = None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    crop: float = 76 / 64,
    caption: int = 0,
) -> LoadedSplit:
    """A split's samples for evaluation: centre crop, no mirroring, caption number `caption`.

    sizes: lowest first. limit: at most so many samples, drawn by `seed` (None: all). rows: these samples, in this
    order, which must be the split's. crop: as in DataConfig. Samples that cannot be used are left out, with a warning
    that names them.
    """
    _check_picture_sizes(sizes)
    of_split = dataset.split(split)
    chosen = np.arange(len(of_split)) if rows is None else np.asarray(rows, dtype=np.int64)
    if limit is not None and limit < len(of_split):
        assert rows is None, "limit and rows both say which samples"
        chosen = np.sort(permutation(len(of_split), "limit", seed)[:limit])
    attributes = _numbered(dataset.attribute_names)
    recipe = SampleTransform(
        of_split, dataset.vocabulary, attributes, max_words, crop, flip=False, vectors=dataset.vectors, caption=caption
    )
    reader = ShardReader(dataset, split)
    arrays = recipe.arrays(len(chosen), sizes)

    def fill(run: SampleRange, first: int) -> None:
        wanted = range(*np.searchsorted(chosen, [first, first + run.count]))
        if wanted:
            read = reader.read(run)
            places = [RowTask(row, int(chosen[row]), None, read[int(chosen[row]) - first]) for row in wanted]
            recipe.fill(arrays, places)

    starts = np.cumsum([0, *of_split.shard_sizes])
    with cores.single_threaded_pool(2, "load") as pool:
        work = [
            pool.submit(fill, SampleRange(shard, first, min(_RUN_SAMPLES, size - first)), int(starts[shard]) + first)
            for shard, size in enumerate(of_split.shard_sizes)
            for first in range(0, size, _RUN_SAMPLES)
        ]
        for done in work:
            done.result()
    for row, reason in sorted(arrays.bad.items()):
        logger.warning("sample %s is left out: %s", arrays.ids[row], reason)
    good = [row for row in range(len(chosen)) if row not in arrays.bad]
    return LoadedSplit(
        batch=arrays.rows(good).batch(groups=1),
        captions=tuple(tuple(of_split.captions(int(chosen[row]))) for row in good),
        attributes=tuple(tuple(of_split.attributes(int(chosen[row]))) for row in good),
    )


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _check_picture_sizes(sizes: Sequence[int]) -> None:
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ValueError(f"picture sizes {list(sizes)}: give at least one, lowest first")
