"""The data loader of a worker: batches prepared in background threads.

One thread follows the run's order and submits work; a few threads read windows; `config.threads` threads decode, crop,
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

import numpy as np
import torch

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.contract import Batch
from t2idist.data.cache import ShardCache
from t2idist.data.collate import BatchBuffer, RowTask, SampleTransform
from t2idist.data.decoded_cache import DecodedCache, open_decoded_cache
from t2idist.data.lanes import READ_SAMPLES, Lane
from t2idist.data.order import Order, SampleRange, permutation, random_bits
from t2idist.data.pairs import Pairs
from t2idist.data.reader import ShardReader
from t2idist.data.shards import Dataset, cache_folder
from t2idist.data.transforms import shorter_side

logger = logging.getLogger(__name__)

_READ_THREADS = 8
_DECODE_CHUNK = 8
_BATCHES_AHEAD = (2, 64)
_READ_SAMPLES = 256


@dataclass(frozen=True)
class LoaderSpec:
    """The batches that one worker loads.

    Raises:
        ValueError: If `sizes` or `groups` are invalid.
    """

    config: DataConfig
    sizes: tuple[int, ...]
    """Pixels of each side of the images, lowest first."""
    groups: Sequence[int]
    """Groups of this worker, out of `total_groups`; in a batch they are in ascending order."""
    total_groups: int
    group_size: int
    step0: int = 0
    """Step of the first batch."""
    split: str = "train"
    training: bool = True
    """Draw crop, flip, caption and words at random; otherwise centre crop and first caption."""
    for_device: bool = False
    """As in `BatchBuffer`: the batches go to an accelerator."""

    def __post_init__(self) -> None:
        groups = sorted(set(self.groups))
        if not groups or groups[0] < 0 or groups[-1] >= self.total_groups or len(groups) != len(self.groups):
            raise ValueError(
                f"groups {list(self.groups)} of a worker: at least one is needed, each once, "
                f"out of 0 to {self.total_groups - 1}"
            )
        _check_image_sizes(self.sizes)


@dataclass(frozen=True)
class _PendingBatch:
    """A batch whose rows are being filled."""

    buffer: BatchBuffer
    work: list[Future[None]]


class Loader(Iterator[Batch]):
    """An endless iterator over the batches of one worker's groups, one for each step from `spec.step0` on.

    A sample that is unusable is replaced by a copy of the good sample before it in its group (or of the first good
    one), so that no other sample moves. An exception in a thread is raised by `next`. `close` ends all threads.

    Attributes:
        quarantine: Unusable samples: key and reason.
        samples_read: Number of rows in all batches so far.
        bad_reads: Number of those rows that were replaced.
        wait_seconds: Total time that `next` has waited.
    """

    def __init__(self, spec: LoaderSpec, order: Order, reader: ShardReader, transform: SampleTransform) -> None:
        self.quarantine: dict[str, str] = {}
        self.samples_read = 0
        self.bad_reads = 0
        self.wait_seconds = 0.0
        self._spec = spec
        self._groups = tuple(sorted(spec.groups))
        self._order = order
        self._reader = reader
        self._transform = transform
        self._read_pool = ThreadPoolExecutor(_READ_THREADS, "read")
        self._decode_pool = single_threaded_pool(spec.config.threads or 2, "decode")
        budget_bytes = (spec.config.prefetch_mib << 20) // 2  # half for encoded samples, half for batches
        ahead = max(READ_SAMPLES, budget_bytes // len(self._groups) // max(reader.mean_bytes, 1))
        self._lanes = {group: Lane(group, order, reader, self._read_pool, ahead) for group in self._groups}
        batch_bytes = transform.new_buffer(1, spec.sizes, spec.for_device).nbytes * order.group_size * len(self._groups)
        fewest, most = _BATCHES_AHEAD
        self._queue: queue.Queue[_PendingBatch | BaseException] = queue.Queue(
            max(fewest, min(most, budget_bytes // batch_bytes))
        )
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._produce_batches, name="batches", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        if self._failure is not None:
            raise self._failure
        if self._closing.is_set():
            raise RuntimeError("this loader is closed")
        began = time.perf_counter()
        try:
            pending = self._queue.get()
            if isinstance(pending, BaseException):
                raise pending
            for work in pending.work:
                work.result()
            self._replace_bad_rows(pending.buffer)
        except BaseException as error:
            self._failure = error
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - began
        return pending.buffer.to_batch(len(self._groups))

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all threads. May be called more than once."""
        self._closing.set()
        self._reader.close()
        for pool in (self._read_pool, self._decode_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        self._thread.join()
        for pool in (self._read_pool, self._decode_pool):
            pool.shutdown(wait=True)

    def _replace_bad_rows(self, buffer: BatchBuffer) -> None:
        size = self._order.group_size
        self.samples_read += len(buffer.ids)
        self.bad_reads += len(buffer.bad)
        for row, reason in sorted(buffer.bad.items()):
            if buffer.ids[row] not in self.quarantine:
                logger.warning("sample %s is skipped: %s", buffer.ids[row], reason)
            self.quarantine[buffer.ids[row]] = reason
        for row in sorted(buffer.bad):
            start = row - row % size
            good = [other for other in range(start, start + size) if other not in buffer.bad]
            if not good:
                names = ", ".join(buffer.ids[start : start + size][:5])
                raise ValueError(f"no sample of a group of {size} is usable (such as {names}): {buffer.bad[row]}")
            before = [other for other in good if other < row]
            buffer.copy_row(before[-1] if before else good[0], row)

    def _produce_batches(self) -> None:
        step = self._spec.step0
        try:
            while not self._closing.is_set():
                self._put(self._submit_step(step))
                step += 1
        except BaseException as error:  # `next` raises it
            if not self._closing.is_set():
                self._put(error)

    def _put(self, item: _PendingBatch | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _submit_step(self, step: int) -> _PendingBatch:
        size = self._order.group_size
        buffer = self._transform.new_buffer(size * len(self._groups), self._spec.sizes, self._spec.for_device)
        work = []
        for place, group in enumerate(self._groups):
            indices = self._order.sample_indices(step, group)
            bits = random_bits(self._order.seed, self._order.position(step, group), size)
            samples = [
                sample for part in self._order.window_slices(step, group) for sample in self._lanes[group].pop(part)
            ]
            tasks = [
                RowTask(place * size + i, int(indices[i]), bits[i] if self._spec.training else None, samples[i])
                for i in range(size)
            ]
            for first in range(0, size, _DECODE_CHUNK):
                chunk = tasks[first : first + _DECODE_CHUNK]
                work.append(self._decode_pool.submit(self._transform.fill, buffer, chunk))
        return _PendingBatch(buffer, work)


def open_loader(dataset: Dataset, spec: LoaderSpec, seed: int) -> Loader:
    """Start loading batches of one data set, in the order that `seed` determines."""
    split, config = dataset.split(spec.split), spec.config
    order = Order(seed, split.shard_sizes, spec.total_groups, spec.group_size)
    cache, decoded = _open_caches(dataset, spec)
    transform = SampleTransform(
        split, dataset.vocabulary, _index_by_name(dataset.attribute_names), config.max_words, config.crop, config.flip,
        config.random_crop, dataset.vector_info, config.vectors_mean_of, decoded_cache=decoded,
        pairs=Pairs.of(dataset),
    )  # fmt: skip
    return Loader(spec, order, ShardReader(dataset, spec.split, cache, decoded), transform)


def _open_caches(dataset: Dataset, spec: LoaderSpec) -> tuple[ShardCache | None, DecodedCache | None]:
    """Open the cache of a remote set's shards, and that of decoded images, which has the rest of the space."""
    config = spec.config
    if not config.cache_gib:
        return None, None
    folder, limit_bytes = cache_folder(config.cache), int(config.cache_gib * 2**30)
    cache, rest = None, limit_bytes
    if not storage.is_local(dataset.url):
        shards = [shard for split in dataset.splits.values() for shard in split.shards]
        cache = ShardCache(folder / "shards", limit_bytes, dataset.url, shards, endpoint_url=dataset.endpoint_url)
        rest -= sum(shard.bytes for shard in shards)
    shorter = None if dataset.stored_pairs else shorter_side(spec.sizes[-1], config.crop)
    return cache, open_decoded_cache(folder / "decoded", rest, dataset, spec.split, shorter)


@dataclass(frozen=True)
class LoadedSplit:
    """Samples of a split in memory."""

    batch: Batch
    """The samples, n in all, as one group, in the order of the split; uint8 images."""
    captions: tuple[tuple[str, ...], ...]
    """(n,) all captions of each sample."""
    attributes: tuple[tuple[str, ...], ...]
    """(n,) names of the attributes of each sample."""


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
    """Load samples of a split for evaluation: centre crop, no flip, one fixed caption.

    Samples that are unusable are left out, with a warning that names them.

    Args:
        dataset: The shard set.
        split: Name of the split.
        sizes: Pixels of each side of the images, lowest first.
        max_words: Number of tokens of a caption.
        limit: Load a random subset of at most `limit` samples (None: all).
        seed: Seed of the subset.
        rows: Load these samples, in ascending order of their index in the split (None: all).
        crop: As in DataConfig.
        caption: Index of the caption.
    """
    _check_image_sizes(sizes)
    samples = dataset.split(split)
    chosen = np.arange(len(samples)) if rows is None else np.asarray(rows, dtype=np.int64)
    if limit is not None and limit < len(samples):
        assert rows is None, "limit and rows exclude each other"
        chosen = np.sort(permutation(len(samples), "limit", seed)[:limit])
    transform = SampleTransform(
        samples, dataset.vocabulary, _index_by_name(dataset.attribute_names), max_words, crop, flip=False,
        random_crop=False, vector_info=dataset.vector_info, caption=caption, pairs=Pairs.of(dataset),
    )  # fmt: skip
    reader = ShardReader(dataset, split)
    buffer = transform.new_buffer(len(chosen), sizes)

    def fill(part: SampleRange, first: int) -> None:
        rows = range(*np.searchsorted(chosen, [first, first + part.count]))
        if rows:
            encoded = reader.read(part)
            tasks = [RowTask(row, int(chosen[row]), None, encoded[int(chosen[row]) - first]) for row in rows]
            transform.fill(buffer, tasks)

    starts = np.cumsum([0, *samples.shard_sizes])
    with single_threaded_pool(2, "load") as pool:
        work = [
            pool.submit(fill, SampleRange(shard, first, min(_READ_SAMPLES, size - first)), int(starts[shard]) + first)
            for shard, size in enumerate(samples.shard_sizes)
            for first in range(0, size, _READ_SAMPLES)
        ]
        for done in work:
            done.result()
    for row, reason in sorted(buffer.bad.items()):
        logger.warning("sample %s is skipped: %s", buffer.ids[row], reason)
    good = [row for row in range(len(chosen)) if row not in buffer.bad]
    return LoadedSplit(
        batch=buffer.select(good).to_batch(groups=1),
        captions=tuple(tuple(samples.captions(int(chosen[row]))) for row in good),
        attributes=tuple(tuple(samples.attributes(int(chosen[row]))) for row in good),
    )


def single_threaded_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Return a pool of threads in each of which torch computes on one core.

    With more cores, each thread starts its own OpenMP helpers. Once these outnumber the cores, all OpenMP threads of
    the process sleep after every operation instead of polling, and waking them makes the training a quarter slower.
    """
    torch.get_num_threads()  # fixes the calling thread's own count now; at a later first use it would be 1
    return ThreadPoolExecutor(threads, name, initializer=torch.set_num_threads, initargs=(1,))


def _index_by_name(names: Sequence[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(names)}


def _check_image_sizes(sizes: Sequence[int]) -> None:
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ValueError(f"image sizes {list(sizes)}: at least one is needed, in ascending order")
