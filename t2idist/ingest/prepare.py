"""Convert listed images to packed samples, in order, in this process or in several that prefetch."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol

import torch

from t2idist import storage
from t2idist.data.image_file import UnusableImage
from t2idist.data.sample_format import MAX_FILE_BYTES, PackedSample, SampleRecord, pack
from t2idist.ingest.captions import CaptionOptions, clean_captions
from t2idist.ingest.files import MAX_LINE_BYTES, ByteRange, read_limited, text_lines
from t2idist.ingest.image import ImageOptions, prepare_image, prepare_pair
from t2idist.ingest.listing import ListedImage
from t2idist.ingest.rejects import Effect, Reason, Reject

_CHUNK = 8
_CHUNKS_AHEAD = 4
_READ_THREADS = 8
_BYTES_AHEAD = 256 << 20


@dataclass(frozen=True)
class SampleResult:
    """Result for one listed image."""

    packed: PackedSample | None
    """None if the image is excluded."""
    rejects: tuple[Reject, ...]
    captions_cut: int = 0


@dataclass(frozen=True)
class FileContents:
    """The content of a listed image's files, each with why it was not read in its place."""

    text: bytes | Reject
    """Of the caption file; empty if there is none."""
    data: bytes | Reject
    """Of the image file."""
    partner: bytes | Reject | None
    """Of the file of the second image of a pair (None: there is no such file)."""

    @property
    def size_bytes(self) -> int:
        return sum(len(each) for each in (self.data, self.partner) if isinstance(each, bytes))


class Preparer(Protocol):
    """Converts listed images to results, in order."""

    def run(self, images: Iterator[ListedImage]) -> Iterator[SampleResult]: ...

    def close(self) -> None: ...


def start_preparer(options: ImageOptions, captions: CaptionOptions, processes: int) -> Preparer:
    """Return a preparer that runs in this process, or in N spawned ones, which exit with this process."""
    return (
        InProcessPreparer(options, captions) if processes == 1 else MultiprocessPreparer(options, captions, processes)
    )


def prepare_sample(
    image: ListedImage, contents: FileContents, options: ImageOptions, captions: CaptionOptions
) -> SampleResult:
    """Convert one image, or a pair, and its captions to a packed sample."""
    text, data, partner = contents.text, contents.data, contents.partner
    lines = [] if isinstance(text, Reject) else text_lines(text, captions.encoding)
    file = image.text_url if lines and not image.captions else None
    location = "caption" if file is None else f"{file.rsplit('/', 1)[-1]}, line"
    cleaned = clean_captions([*image.captions, *lines], captions, location)
    rejects = [text] if isinstance(text, Reject) else []
    rejects += [_reject(image, reason, Effect.CAPTION_EXCLUDED, detail) for reason, detail in cleaned.rejected]
    if not cleaned.captions and image.needs_captions:
        rejects.append(_reject(image, Reason.NO_CAPTIONS, Effect.EXCLUDED, "it has no usable caption"))
        return SampleResult(None, tuple(rejects))
    if isinstance(data, Reject):
        return SampleResult(None, (*rejects, data))
    if isinstance(partner, Reject):
        return SampleResult(None, (*rejects, partner))
    try:
        prepared = prepare_pair(data, partner, options) if options.pairs else prepare_image(data, options, image.box)
    except UnusableImage as error:
        return SampleResult(None, (*rejects, _reject(image, error.reason, Effect.EXCLUDED, error.detail)))
    rejects += [_reject(image, reason, Effect.REPAIRED, detail) for reason, detail in prepared.repairs]
    record = SampleRecord(
        image.split, image.key, prepared.data, prepared.extension, cleaned.captions, prepared.width, prepared.height,
        image.attributes, image.class_id,
    )  # fmt: skip
    return SampleResult(pack(record), tuple(rejects), cleaned.truncated)


def _reject(image: ListedImage, reason: Reason, effect: Effect, detail: str) -> Reject:
    return Reject(image.split, image.name, reason, effect, detail)


class _ByteBudget:
    """Limit the bytes that are prefetched. Requests are granted in ticket order, so the next one needed never waits."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used = 0
        self._next_ticket = 0
        self._closed = False
        self._changed = threading.Condition()

    def acquire(self, ticket: int, size_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (ticket == self._next_ticket and self._fits(size_bytes)))
            self._next_ticket += 1
            self._used += size_bytes
            self._changed.notify_all()

    def _fits(self, size_bytes: int) -> bool:
        return self._used == 0 or self._used + size_bytes <= self._max_bytes

    def close(self) -> None:
        """Grant all waiting requests; the bytes are no longer needed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def release(self, size_bytes: int) -> None:
        with self._changed:
            self._used -= size_bytes
            self._changed.notify_all()


class Prefetcher:
    """Read files in a few threads while the calling thread decodes; results keep the order of the images."""

    def __init__(self, options: ImageOptions, captions: CaptionOptions) -> None:
        self._options = options
        self._captions = captions
        self._budget = _ByteBudget(_BYTES_AHEAD)
        self._tickets = 0
        self._pool = ThreadPoolExecutor(_READ_THREADS, "read")

    def start(self, image: ListedImage) -> Future[FileContents] | None:
        """Start to read. Returns None for a file on disk, which the kernel prefetches without a thread."""
        if storage.is_local(image.url):
            for url in (image.url, image.partner_url):
                if url is not None:
                    _advise_kernel(storage.local_name(url), image.part or ByteRange(0, 0))
            return None
        ticket = self._tickets
        self._tickets += 1
        return self._pool.submit(self._read, image, ticket)

    def finish(self, image: ListedImage, read: Future[FileContents] | None) -> SampleResult:
        """Return the result. Raises the exception of the read, unless the file itself is at fault."""
        if read is None:
            return prepare_sample(image, _read_files(image), self._options, self._captions)
        contents = read.result()
        try:
            return prepare_sample(image, contents, self._options, self._captions)
        finally:
            self._budget.release(contents.size_bytes)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._budget.close()

    def _read(self, image: ListedImage, ticket: int) -> FileContents:
        contents = None
        try:
            contents = _read_files(image)
            return contents
        finally:
            self._budget.acquire(ticket, 0 if contents is None else contents.size_bytes)


def _advise_kernel(path: str | None, part: ByteRange) -> None:
    """Ask the kernel to prefetch a part of a file (length 0: up to its end), if the platform supports it."""
    if path is None or not hasattr(os, "posix_fadvise"):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return  # reported when the file is read
    try:
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, part.start, part.length, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def _read_files(image: ListedImage) -> FileContents:
    """Read the caption file, the image file and that of the second image of a pair."""
    text: bytes | Reject = b""
    if image.text_url is not None:
        text = _read_or_reject(image, image.text_url, Effect.CAPTION_EXCLUDED, MAX_LINE_BYTES)
    data = _read_or_reject(image, image.url, Effect.EXCLUDED, MAX_FILE_BYTES, image.part)
    if image.part is not None and isinstance(data, bytes) and len(data) != image.part.length:
        detail = f"{len(data)} bytes instead of {image.part.length}; its tar ends too early, or has no range requests"
        data = _reject(image, Reason.TRUNCATED, Effect.EXCLUDED, detail)
    partner = None
    if image.partner_url is not None:
        partner = _read_or_reject(image, image.partner_url, Effect.EXCLUDED, MAX_FILE_BYTES)
    return FileContents(text, data, partner)


def _read_or_reject(
    image: ListedImage, url: str, effect: Effect, max_bytes: int, part: ByteRange | None = None
) -> bytes | Reject:
    try:
        return read_limited(url, max_bytes, part)
    except FileNotFoundError:
        return b"" if effect is Effect.CAPTION_EXCLUDED else _reject(image, Reason.NO_IMAGE, effect, "no such file")
    except IsADirectoryError:
        return _reject(image, Reason.NOT_AN_IMAGE, effect, "it is a folder")
    except OverflowError as error:
        return _reject(image, Reason.FILE_TOO_LARGE, effect, str(error))


class InProcessPreparer:
    """Prepare in this process: for one core, and for memory:// URLs, which other processes cannot read."""

    def __init__(self, options: ImageOptions, captions: CaptionOptions) -> None:
        self._prefetcher = Prefetcher(options, captions)
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the tasks are too small for several threads

    def run(self, images: Iterator[ListedImage]) -> Iterator[SampleResult]:
        pending: deque[tuple[ListedImage, Future[FileContents] | None]] = deque()
        for image in images:
            pending.append((image, self._prefetcher.start(image)))
            if len(pending) >= _CHUNK * _CHUNKS_AHEAD:
                yield self._prefetcher.finish(*pending.popleft())
        while pending:
            yield self._prefetcher.finish(*pending.popleft())

    def close(self) -> None:
        torch.set_num_threads(self._threads)
        self._prefetcher.close()


class MultiprocessPreparer:
    """Prepare in spawned processes (fork breaks s3fs). Each has a pipe; the least busy one gets the next chunk."""

    def __init__(self, options: ImageOptions, captions: CaptionOptions, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for number in range(processes):
            pipe, worker_pipe = context.Pipe()
            arguments = (worker_pipe, options, captions)
            process = context.Process(target=_worker_main, args=arguments, name=f"prepare-{number}", daemon=True)
            process.start()
            worker_pipe.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def run(self, images: Iterator[ListedImage]) -> Iterator[SampleResult]:
        """Yield the results. Raises the OSError or ValueError of a worker, and RuntimeError if a worker exits."""
        chunks = _chunks(images)
        busy = [0] * len(self._pipes)
        done: dict[int, list[SampleResult]] = {}
        sent = yielded = 0
        more = True
        while True:
            while more and sent < yielded + _CHUNKS_AHEAD * len(self._pipes):
                chunk = next(chunks, None)
                if chunk is None:
                    more = False
                    break
                worker = busy.index(min(busy))
                self._send(worker, (sent, chunk))
                busy[worker] += 1
                sent += 1
            if yielded == sent:
                return
            while yielded not in done:
                for pipe in wait(self._pipes):
                    assert isinstance(pipe, Connection)
                    worker = self._pipes.index(pipe)
                    index, results = self._receive(worker)
                    done[index] = results
                    busy[worker] -= 1
            yield from done.pop(yielded)
            yielded += 1

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def _send(self, worker: int, message: tuple[int, list[ListedImage]]) -> None:
        try:
            self._pipes[worker].send(message)
        except OSError:
            raise self._exit_error(worker) from None

    def _receive(self, worker: int) -> tuple[int, list[SampleResult]]:
        try:
            message = self._pipes[worker].recv()
        except (EOFError, OSError):
            raise self._exit_error(worker) from None
        if isinstance(message, _WorkerError):
            raise message.as_exception()
        index, results = message
        return index, results

    def _exit_error(self, worker: int) -> RuntimeError:
        process = self._processes[worker]
        process.join(5)
        return RuntimeError(
            f"a worker process exited unexpectedly (exit status {process.exitcode}), perhaps for lack of memory; "
            "fewer --processes need less"
        )


def _chunks(images: Iterator[ListedImage]) -> Iterator[list[ListedImage]]:
    chunk: list[ListedImage] = []
    for image in images:
        chunk.append(image)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@dataclass(frozen=True)
class _WorkerError:
    """An exception in a worker, sent to the main process."""

    kind: str
    message: str
    trace: str

    def as_exception(self) -> Exception:
        if self.kind == "ValueError":
            return ValueError(self.message)
        if self.kind == "OSError":
            return OSError(self.message)
        return RuntimeError(f"{self.message}\n{self.trace}")


def _worker_main(pipe: Connection, options: ImageOptions, captions: CaptionOptions) -> None:
    """Run a worker until the main process closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles it
    torch.set_num_threads(1)  # one process per core
    prefetcher = Prefetcher(options, captions)
    inbox: queue.Queue[tuple[int, list[tuple[ListedImage, Future[FileContents] | None]]]] = queue.Queue()

    def receive() -> None:
        while True:
            try:
                index, chunk = pipe.recv()
            except (EOFError, OSError):
                os._exit(0)  # the main process has exited
            inbox.put((index, [(image, prefetcher.start(image)) for image in chunk]))

    threading.Thread(target=receive, daemon=True).start()
    while True:
        index, chunk = inbox.get()
        try:
            message: object = (index, [prefetcher.finish(image, read) for image, read in chunk])
        except Exception as error:
            kind = next((k for k in (OSError, ValueError) if isinstance(error, k)), RuntimeError).__name__
            message = _WorkerError(kind, str(error), traceback.format_exc())
        try:
            pipe.send(message)
        except OSError:
            os._exit(0)
