"""A cache of whole shards on local disk, shared by the processes of a node; later epochs do not read from the store.

A file's name is the SHA-256 of its content. Shards are read in the order of a random permutation, in which the one used
last is no likelier to be next. The shards of the data set in use are therefore never evicted for each other: those
that do not fit are read from the store. Only shards of other data sets that have not been used for a while are
evicted, the oldest first.
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
"""A shard of another data set may be evicted after this time without use."""
_TOUCH_SECONDS = 300.0
_FETCHES_IN_FLIGHT = 4
_PART, _LOCK = ".part", ".lock"


class ShardCache:
    """Local copies of the shards of one data set; safe for several threads and processes.

    If the disk fails, a warning is logged once and the cache is disabled.

    Args:
        folder: Folder of the cached files.
        limit_bytes: Limit for all files in `folder`, whichever process or data set they belong to.
        url: Folder of the shard set.
        shards: All shards of the set.
        endpoint_url: Of the object store (None: the environment's).
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
        self._uncacheable: set[str] = set()
        self._touched: dict[str, float] = {}
        self._usable = True
        self._lock = threading.Lock()

    def read(self, shard: Shard, start: int, end: int) -> bytes | None:
        """Return bytes [start, end) of a shard, downloading it first if needed; None if it cannot be cached."""
        if not self._usable or shard.sha256 in self._uncacheable:
            return None
        path = self._folder / shard.sha256
        try:
            if not _is_complete(path, shard) and not self._download(path, shard):
                self._uncacheable.add(shard.sha256)
                return None
            self._touch(path)
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(end - start)
        except FileNotFoundError:
            return None  # evicted by another process just now
        except OSError as error:
            if error.errno is None:
                raise  # an error of the store, not of the disk
            with self._lock:
                reported, self._usable = not self._usable, False
            if not reported:
                logger.warning("the shard cache in %s is disabled: %s", self._folder, error)
            return None

    def close(self) -> None:
        """Cancel downloads that wait for the store or for another process; they raise storage.Cancelled."""
        self._stop.set()

    def drop(self, shard: Shard) -> None:
        """Delete the local copy, because its bytes are wrong."""
        with contextlib.suppress(OSError):
            (self._folder / shard.sha256).unlink(missing_ok=True)

    def _touch(self, path: Path) -> None:
        now = time.monotonic()
        if now - self._touched.get(path.name, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[path.name] = now
            os.utime(path)

    def _download(self, path: Path, shard: Shard) -> bool:
        """Download a shard and verify its hash. Returns whether it is in the cache now."""
        self._folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + _PART)
        with self._locked(path.name):
            if _is_complete(path, shard):
                return True  # another process has downloaded it in the meantime
            for left_over in (part, path):  # of a process that died; of another size
                left_over.unlink(missing_ok=True)
            if not self._reserve(part, shard.bytes):
                return False
            try:
                for _ in range(2):
                    self._copy(part, shard)
                    if _sha256(part) == shard.sha256:
                        os.replace(part, path)
                        return True
                logger.warning("%s/%s: its bytes differ from its hash", storage.redact(self._url), shard.name)
                return False
            finally:
                part.unlink(missing_ok=True)

    def _copy(self, part: Path, shard: Shard) -> None:
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
        """Create a file of that size if the limit allows it, evicting idle files of other data sets if needed."""
        with self._locked("cache"):
            self._remove_orphaned_parts()
            files = [entry for entry in self._folder.iterdir() if entry.suffix != _LOCK]
            usage = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.name) for entry in files)
            excess = sum(size for _, size, _ in usage) + size_bytes - self._limit_bytes
            idle = [
                (size, name)
                for used_at, size, name in usage
                if name not in self._own and not name.endswith(_PART) and time.time() - used_at > IDLE_SECONDS
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

    def _remove_orphaned_parts(self) -> None:
        """Remove unfinished files whose lock nobody holds: the processes that wrote them died."""
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


def _is_complete(path: Path, shard: Shard) -> bool:
    """Return whether there is a file of the shard's size."""
    try:
        return path.stat().st_size == shard.bytes
    except FileNotFoundError:
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
