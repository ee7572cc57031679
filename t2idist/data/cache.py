"""Whole shards on local disk, shared by the processes of a host, so that later epochs ask the store for nothing.

A file's name is the SHA-256 of its bytes. The order of reading is a random permutation, in which the shard that was
used last is no likelier to come next: shards of the data set in use never push each other out, what does not fit is
read from the store. Only shards of other data sets that nobody used for a while make room, the oldest first.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from t2idist import storage
from t2idist.data.shards import Shard

logger = logging.getLogger(__name__)

IDLE_SECONDS = 3600.0
"""A shard of another data set may go when nobody used it for so long."""
_TOUCH_SECONDS = 300.0
_FETCHES_IN_FLIGHT = 4
_PART, _LOCK = ".part", ".lock"


class ShardCache:
    """Shards of one data set at `url`, kept in `folder`; may be used by several threads and processes.

    limit_bytes: of all files in `folder`, whichever process or data set they belong to. shards: all of this data set.
    Trouble with the disk is told once, and then the cache is not used any more.
    """

    def __init__(
        self, folder: Path, limit_bytes: int, url: str, shards: Iterable[Shard], *, endpoint_url: str | None = None
    ) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._url = url
        self._endpoint_url = endpoint_url
        self._own = {shard.sha256 for shard in shards}
        self._stop = threading.Event()
        self._left_out: set[str] = set()
        self._touched: dict[str, float] = {}
        self._usable = True
        self._lock = threading.Lock()

    def read(self, shard: Shard, start: int, end: int) -> bytes | None:
        """Bytes [start, end) of the shard, which is fetched first if need be; None where it is not to be had here."""
        if not self._usable or shard.sha256 in self._left_out:
            return None
        path = self._folder / shard.sha256
        try:
            if not _whole(path, shard) and not self._fetch(path, shard):
                self._left_out.add(shard.sha256)
                return None
            self._touch(path)
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(end - start)
        except FileNotFoundError:
            return None  # dropped by another process in this moment
        except OSError as error:
            if error.errno is None:
                raise  # the store's, not the disk's
            with self._lock:
                told, self._usable = not self._usable, False
            if not told:
                logger.warning("the shard cache in %s is not used any more: %s", self._folder, error)
            return None

    def close(self) -> None:
        """End fetches that wait for the store or for another process: they raise storage.Cancelled."""
        self._stop.set()

    def drop(self, shard: Shard) -> None:
        """Forget the local copy, whose bytes have proved wrong."""
        with contextlib.suppress(OSError):
            (self._folder / shard.sha256).unlink(missing_ok=True)

    def _touch(self, path: Path) -> None:
        now = time.monotonic()
        if now - self._touched.get(path.name, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[path.name] = now
            os.utime(path)

    def _fetch(self, path: Path, shard: Shard) -> bool:
        """Whether the shard is there now, whole and verified."""
        self._folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + _PART)
        with self._locked(path.name):
            if _whole(path, shard):
                return True  # another process has fetched it in the meantime
            for left_over in (part, path):  # of one that died; a file of another size
                left_over.unlink(missing_ok=True)
            if not self._reserve(part, shard.bytes):
                return False
            try:
                for _ in range(2):
                    self._fill(part, shard)
                    if _sha256(part) == shard.sha256:
                        os.replace(part, path)
                        return True
                logger.warning("%s/%s: its bytes differ from its hash", storage.redact(self._url), shard.name)
                return False
            finally:
                part.unlink(missing_ok=True)

    def _fill(self, part: Path, shard: Shard) -> None:
        url = storage.join(self._url, shard.name)

        def fetch(first: int) -> None:
            end = min(first + storage.BLOCK_BYTES, shard.bytes)
            data = storage.read_bytes(url, first, end, endpoint_url=self._endpoint_url, stop=self._stop)
            os.pwrite(file.fileno(), data, first)

        with open(part, "r+b") as file:
            with ThreadPoolExecutor(_FETCHES_IN_FLIGHT, "fetch") as pool:
                for done in [pool.submit(fetch, first) for first in range(0, shard.bytes, storage.BLOCK_BYTES)]:
                    done.result()
            os.fsync(file.fileno())

    def _reserve(self, part: Path, size_bytes: int) -> bool:
        """Make a file of that size if the limit allows it; files of other data sets may go for it."""
        with self._locked("cache"):
            self._sweep()
            files = [entry for entry in self._folder.iterdir() if entry.suffix != _LOCK]
            facts = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.name) for entry in files)
            excess = sum(size for _, size, _ in facts) + size_bytes - self._limit_bytes
            idle = [
                (size, name)
                for moment, size, name in facts
                if name not in self._own and not name.endswith(_PART) and time.time() - moment > IDLE_SECONDS
            ]
            if excess > sum(size for size, _ in idle):
                return False
            for size, name in idle:
                if excess <= 0:
                    break
                (self._folder / name).unlink(missing_ok=True)
                excess -= size
            with open(part, "wb") as file:
                file.truncate(size_bytes)
            return True

    def _sweep(self) -> None:
        """Remove what processes that died have left unfinished: parts that nobody holds the lock of."""
        for part in self._folder.glob(f"*{_PART}"):
            lock = FileLock(self._folder / f"{part.stem}{_LOCK}")
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):
                part.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        lock = FileLock(self._folder / f"{name}{_LOCK}")
        while True:
            try:
                lock.acquire(timeout=1, poll_interval=0.1)
                break
            except Timeout:
                if self._stop.is_set():
                    raise storage.Cancelled(name) from None
        try:
            yield
        finally:
            lock.release()


def _whole(path: Path, shard: Shard) -> bool:
    """Whether a finished copy is there; one of another size is none."""
    try:
        return path.stat().st_size == shard.bytes
    except FileNotFoundError:
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
