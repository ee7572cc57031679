"""From listed sources to packed samples: in this process, or in several that read ahead; the order is kept."""

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
from t2idist.data.sample_format import PackedSample, SampleRecord, pack
from t2idist.ingest.captions import clean
from t2idist.ingest.files import MAX_LINE_BYTES, read_limited
from t2idist.ingest.image import PictureOptions, Prepared, Unusable, prepare
from t2idist.ingest.listing import ListedImage
from t2idist.ingest.rejects import Effect, Reason, Reject

_CHUNK = 8
_CHUNKS_AHEAD = 4
_READ_THREADS = 8
_BYTES_AHEAD = 256 << 20


@dataclass(frozen=True)
class Outcome:
    """What became of one source: packed is None where it is left out."""

    packed: PackedSample | None
    rejects: tuple[Reject, ...]
    captions_cut: int = 0


class Preparers(Protocol):
    """Whatever turns sources into outcomes, in their order."""

    def run(self, sources: Iterator[ListedImage]) -> Iterator[Outcome]: ...

    def close(self) -> None: ...


def start_preparers(options: PictureOptions, max_words: int | None, processes: int) -> Preparers:
    """One process: this one. More: spawned ones, which end with this one whatever ends it."""
    return Inline(options, max_words) if processes == 1 else Processes(options, max_words, processes)


def make_outcome(
    source: ListedImage, data: bytes | Reject, text: bytes | Reject, options: PictureOptions, max_words: int | None
) -> Outcome:
    """data, text: what was read of the picture and of its caption file, or why it could not be used."""
    cleaned = clean([*source.captions, *(() if isinstance(text, Reject) else _text_lines(text))], max_words)
    rejects = [text] if isinstance(text, Reject) else []
    rejects += [_reject(source, why, Effect.CAPTION_LEFT_OUT, detail) for why, detail in cleaned.left_out]
    if not cleaned.captions and source.needs_captions:
        rejects.append(_reject(source, Reason.NO_CAPTIONS, Effect.LEFT_OUT, "no caption of it can be used"))
        return Outcome(None, tuple(rejects))
    if isinstance(data, Reject):
        return Outcome(None, (*rejects, data))
    try:
        prepared = prepare(data, options, source.box)
    except Unusable as error:
        return Outcome(None, (*rejects, _reject(source, error.reason, Effect.LEFT_OUT, error.detail)))
    rejects += [_reject(source, why, Effect.REPAIRED, detail) for why, detail in prepared.repairs]
    return Outcome(pack(_record(source, prepared, cleaned.captions)), tuple(rejects), cleaned.cut)


def _record(source: ListedImage, prepared: Prepared, captions: tuple[str, ...]) -> SampleRecord:
    return SampleRecord(
        source.split, source.key, prepared.data, prepared.extension, captions, prepared.width, prepared.height,
        source.attributes, source.class_id,
    )  # fmt: skip


def _text_lines(text: bytes) -> list[bytes]:
    return text.removeprefix(b"\xef\xbb\xbf").rstrip().splitlines()


def _reject(source: ListedImage, reason: Reason, effect: Effect, detail: str) -> Reject:
    return Reject(source.split, source.name, reason, effect, detail)


class _Budget:
    """Bytes that may be read ahead, granted in the order of tickets: whoever is needed next always gets its own."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0
        self._next = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, ticket: int, size_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (ticket == self._next and self._fits(size_bytes)))
            self._next += 1
            self._held += size_bytes
            self._changed.notify_all()

    def _fits(self, size_bytes: int) -> bool:
        return self._held == 0 or self._held + size_bytes <= self._max_bytes

    def close(self) -> None:
        """Let everyone who waits go on: nobody wants the bytes any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def give(self, size_bytes: int) -> None:
        with self._changed:
            self._held -= size_bytes
            self._changed.notify_all()


@dataclass(frozen=True)
class _Read:
    data: bytes | Reject
    text: bytes | Reject
    size_bytes: int


class ReadAhead:
    """Sources in, outcomes out in the same order; a few threads read while the caller's thread decodes."""

    def __init__(self, options: PictureOptions, max_words: int | None) -> None:
        self._options = options
        self._max_words = max_words
        self._budget = _Budget(_BYTES_AHEAD)
        self._tickets = 0
        self._pool = ThreadPoolExecutor(_READ_THREADS, "read")

    def start(self, source: ListedImage) -> Future[_Read] | None:
        """Begin to read. None: of a file on disk, which the kernel reads ahead without a thread that takes turns."""
        if storage.is_local(source.url):
            _advise(storage.local_name(source.url))
            return None
        ticket = self._tickets
        self._tickets += 1
        return self._pool.submit(self._read, source, ticket)

    def finish(self, source: ListedImage, read: Future[_Read] | None) -> Outcome:
        """Raises what reading raised, where it is not the file's own fault."""
        if read is None:
            text, data = _read_both(source)
            return make_outcome(source, data, text, self._options, self._max_words)
        found = read.result()
        try:
            return make_outcome(source, found.data, found.text, self._options, self._max_words)
        finally:
            self._budget.give(found.size_bytes)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._budget.close()

    def _read(self, source: ListedImage, ticket: int) -> _Read:
        held = 0
        try:
            text, data = _read_both(source)
            held = 0 if isinstance(data, Reject) else len(data)
        finally:
            self._budget.take(ticket, held)
        return _Read(data, text, held)


def _advise(path: str | None) -> None:
    """Tell the kernel that the whole file is wanted soon, where it can be told."""
    if path is None or not hasattr(os, "posix_fadvise"):
        return
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return  # reading it says what is wrong
    try:
        with contextlib.suppress(OSError):
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(number)


def _read_both(source: ListedImage) -> tuple[bytes | Reject, bytes | Reject]:
    """The caption file and the picture."""
    text: bytes | Reject = b""
    if source.text_url is not None:
        text = _read_or_reject(source, source.text_url, Effect.CAPTION_LEFT_OUT, MAX_LINE_BYTES)
    return text, _read_or_reject(source, source.url, Effect.LEFT_OUT, None)


def _read_or_reject(source: ListedImage, url: str, effect: Effect, max_bytes: int | None) -> bytes | Reject:
    try:
        return read_limited(url) if max_bytes is None else read_limited(url, max_bytes)
    except FileNotFoundError:
        return b"" if effect is Effect.CAPTION_LEFT_OUT else _reject(source, Reason.NO_PICTURE, effect, "no such file")
    except IsADirectoryError:
        return _reject(source, Reason.NOT_A_PICTURE, effect, "it is a folder")
    except OverflowError as error:
        return _reject(source, Reason.FILE_TOO_LARGE, effect, str(error))


class Inline:
    """Everything in this process; for one core, and for memory:// URLs, which no other process sees."""

    def __init__(self, options: PictureOptions, max_words: int | None) -> None:
        self._work = ReadAhead(options, max_words)
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # several on so small a task wait for each other

    def run(self, sources: Iterator[ListedImage]) -> Iterator[Outcome]:
        ahead: deque[tuple[ListedImage, Future[_Read] | None]] = deque()
        for source in sources:
            ahead.append((source, self._work.start(source)))
            if len(ahead) >= _CHUNK * _CHUNKS_AHEAD:
                yield self._work.finish(*ahead.popleft())
        while ahead:
            yield self._work.finish(*ahead.popleft())

    def close(self) -> None:
        torch.set_num_threads(self._threads)
        self._work.close()


class Processes:
    """Spawned processes (fork breaks s3fs), each with a pipe of its own; chunks of sources go to the least busy."""

    def __init__(self, options: PictureOptions, max_words: int | None, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for number in range(processes):
            mine, theirs = context.Pipe()
            name = f"prepare-{number}"
            process = context.Process(target=_work, args=(theirs, options, max_words), name=name, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, sources: Iterator[ListedImage]) -> Iterator[Outcome]:
        """Raises OSError or ValueError as a worker did, and RuntimeError where one has ended."""
        chunks = _chunks(sources)
        busy = [0] * len(self._pipes)
        done: dict[int, list[Outcome]] = {}
        sent = taken = 0
        more = True
        while True:
            while more and sent < taken + _CHUNKS_AHEAD * len(self._pipes):
                chunk = next(chunks, None)
                if chunk is None:
                    more = False
                    break
                to = busy.index(min(busy))
                self._send(to, (sent, chunk))
                busy[to] += 1
                sent += 1
            if taken == sent:
                return
            while taken not in done:
                for pipe in wait(self._pipes):
                    assert isinstance(pipe, Connection)
                    number = self._pipes.index(pipe)
                    index, outcomes = self._receive(number)
                    done[index] = outcomes
                    busy[number] -= 1
            yield from done.pop(taken)
            taken += 1

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def _send(self, number: int, message: tuple[int, list[ListedImage]]) -> None:
        try:
            self._pipes[number].send(message)
        except OSError:
            raise self._ended(number) from None

    def _receive(self, number: int) -> tuple[int, list[Outcome]]:
        try:
            answer = self._pipes[number].recv()
        except (EOFError, OSError):
            raise self._ended(number) from None
        if isinstance(answer, _Failure):
            raise answer.as_error()
        index, outcomes = answer
        return index, outcomes

    def _ended(self, number: int) -> RuntimeError:
        process = self._processes[number]
        process.join(5)
        return RuntimeError(
            f"a process that prepares pictures ended by itself (exit status {process.exitcode}); was memory too small? "
            "fewer --processes need less"
        )


def _chunks(sources: Iterator[ListedImage]) -> Iterator[list[ListedImage]]:
    chunk: list[ListedImage] = []
    for source in sources:
        chunk.append(source)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@dataclass(frozen=True)
class _Failure:
    """An exception of a worker, on its way to the main process."""

    kind: str
    message: str
    trace: str

    def as_error(self) -> Exception:
        if self.kind == "ValueError":
            return ValueError(self.message)
        if self.kind == "OSError":
            return OSError(self.message)
        return RuntimeError(f"{self.message}\n{self.trace}")


def _work(pipe: Connection, options: PictureOptions, max_words: int | None) -> None:
    """A worker's life: it ends when the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides
    torch.set_num_threads(1)  # there is a process for every core
    work = ReadAhead(options, max_words)
    inbox: queue.Queue[tuple[int, list[tuple[ListedImage, Future[_Read] | None]]]] = queue.Queue()

    def receive() -> None:
        while True:
            try:
                index, chunk = pipe.recv()
            except (EOFError, OSError):
                os._exit(0)  # nobody is left who wants the rest
            inbox.put((index, [(source, work.start(source)) for source in chunk]))

    threading.Thread(target=receive, daemon=True).start()
    while True:
        index, chunk = inbox.get()
        try:
            answer: object = (index, [work.finish(source, read) for source, read in chunk])
        except Exception as error:
            kind = next((k for k in (OSError, ValueError) if isinstance(error, k)), RuntimeError).__name__
            answer = _Failure(kind, str(error), traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            os._exit(0)
