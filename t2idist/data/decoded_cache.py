"""A cache of decoded images on local disk, shared by the processes of a host: later epochs decode nothing.

One file for each split: a header, one entry for each sample, then the pixels in the order in which they came. A process
maps the file and reads it without copies; a thread appends to it. A file is only used by the host that wrote it, and
until that restarts, so that a write that did not reach the disk is never read. When the file is full, the other samples
are decoded at every use: each sample is used once an epoch, so none is worth more than another.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import queue
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from t2idist.data.samples import DecodedImage
from t2idist.data.shards import Dataset
from t2idist.data.transforms import draft_fraction
from t2idist.storage import sha256

logger = logging.getLogger(__name__)

IDLE_SECONDS = 3600.0
"""The file of another split may be evicted after this time without use."""

_HEADER = 4096  # bytes; limit and used bytes, as int64
_ENTRY = 32  # bytes; see `_append`
_ALIGNMENT = 64
_WAITING_BYTES = 64 << 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class DecodedCache:
    """The decoded images of one split; safe for several threads and processes.

    Args:
        path: The file; it exists.
        samples: Number of samples of the split.

    Raises:
        OSError: If the file cannot be mapped or locked.
    """

    def __init__(self, path: Path, samples: int) -> None:
        self._lock = FileLock(path.with_name(path.name + ".lock"))
        self._use = os.open(path, os.O_RDONLY)
        fcntl.flock(self._use, fcntl.LOCK_SH)  # as long as it is open, nobody removes the file
        self._file = os.open(path, os.O_RDWR)  # the map keeps a copy of this one
        os.utime(path)
        self._map = mmap.mmap(self._file, 0, prot=mmap.PROT_READ)
        self._header = np.frombuffer(self._map, np.int64, 2)
        self._entries = np.frombuffer(self._map, np.int64, samples * _ENTRY // 8, _HEADER).reshape(samples, -1)
        self._waiting: queue.SimpleQueue[tuple[int, DecodedImage] | None] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._count = threading.Lock()
        self._full = False
        self._writer = threading.Thread(target=self._write, name="decoded", daemon=True)
        self._writer.start()

    def find(self, indices: range) -> list[DecodedImage | None]:
        """Return consecutive samples, and have the disk read them ahead; None stands for one that is not cached.

        Their pixels are views of the file.
        """
        return [self._view(*entry) for entry in self._entries[indices.start : indices.stop].tolist()]

    def _view(self, offset: int, shape: int, full_shape: int, vector_bytes: int) -> DecodedImage | None:
        if not offset or not shape:
            return None
        height, width = divmod(shape, 1 << 32)
        full_height, full_width = divmod(full_shape, 1 << 32)
        pixels = np.frombuffer(self._map, np.uint32, height * width, offset).reshape(height, width)
        start, end = offset // mmap.PAGESIZE * mmap.PAGESIZE, offset + pixels.nbytes
        self._map.madvise(mmap.MADV_WILLNEED, start, end - start)
        return DecodedImage(pixels, (full_width, full_height), self._map[end : end + vector_bytes])

    def put(self, index: int, image: DecodedImage) -> None:
        """Have a sample written in the background; it is left out if the disk does not keep up."""
        size = image.pixels.nbytes
        with self._count:
            if (
                self._full
                or self._entries[index, 0]
                or (self._waiting_bytes and self._waiting_bytes + size > _WAITING_BYTES)
            ):
                return
            self._waiting_bytes += size
        self._waiting.put((index, image))

    def close(self) -> None:
        """Write what waits and end the thread. Images from `get` stay valid. May be called more than once."""
        self._waiting.put(None)
        self._writer.join()
        if self._file >= 0:
            os.close(self._file)
            os.close(self._use)
            self._file = -1

    def _write(self) -> None:
        while (item := self._waiting.get()) is not None:
            index, image = item
            try:
                if not self._full:
                    self._append(index, image)
            except OSError as error:
                self._full = True
                logger.warning("decoded images are no longer cached: %s", error)
            with self._count:
                self._waiting_bytes -= image.pixels.nbytes

    def _append(self, index: int, image: DecodedImage) -> None:
        data = np.ascontiguousarray(image.pixels)
        needed = -(-(data.nbytes + len(image.vectors)) // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            if self._entries[index, 0]:
                return  # another process has written it
            limit, used = self._header.tolist()
            if used + needed > limit:
                self._full = True
                return
            self._put_bytes(np.array([used + needed], np.int64), 8)
            offset = _HEADER + self._entries.nbytes + used
            self._put_bytes(data, offset)
            if image.vectors:
                self._put_bytes(np.frombuffer(image.vectors, np.uint8), offset + data.nbytes)
            height, width = data.shape
            full_width, full_height = image.size
            shapes = [(height << 32) + width, (full_height << 32) + full_width, len(image.vectors)]
            entry = _HEADER + index * _ENTRY
            self._put_bytes(np.array(shapes, np.int64), entry + 8)
            self._put_bytes(np.array([offset], np.int64), entry)  # last: from now on others read it

    def _put_bytes(self, data: NDArray[Any], offset: int) -> None:
        written = os.pwrite(self._file, data.data, offset)
        if written != data.nbytes:
            raise OSError(f"only {written} of {data.nbytes} bytes were written")


def open_decoded_cache(
    folder: Path, limit_bytes: int, dataset: Dataset, split: str, shorter: int | None
) -> DecodedCache | None:
    """Open the cache of a split, or begin one.

    Args:
        folder: Folder of the files.
        limit_bytes: Limit for all files in it.
        dataset: The shard set.
        split: Name of the split.
        shorter: As for `transforms.decode`.

    Returns:
        The cache; None if there is no room, or if the disk fails, which is logged.
    """
    samples = dataset.split(split)
    drafted = shorter is not None and draft_fraction(samples.largest_shorter_side, shorter) > 1
    identity = f"{dataset.fingerprint} {split} {shorter if drafted else 'full'}"
    try:
        boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else f"{os.uname().nodename}-{os.getpid()}"
        path = folder / f"{sha256(identity.encode())[:32]}-{boot}"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "decoded.lock"):
            needed = samples.decoded_bytes + len(samples) * _ALIGNMENT + int(samples.lengths.sum())
            if not path.exists() and not _create(path, limit_bytes, needed, len(samples)):
                return None
            return DecodedCache(path, len(samples))
    except OSError as error:
        logger.warning("decoded images are not cached in %s: %s", folder, error)
        return None


def _create(path: Path, limit_bytes: int, needed: int, samples: int) -> bool:
    """Create a file of holes for `needed` bytes, or as many as the limit and the disk allow. Returns whether it did."""
    _remove_unused(path, limit_bytes - needed)
    others = sum(file.stat().st_size for file in _cache_files(path.parent))
    capacity = min(needed, limit_bytes - others, shutil.disk_usage(path.parent).free // 2)
    if capacity < needed / max(samples, 1):
        return False
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(np.array([capacity, 0], np.int64).tobytes())
        file.truncate(_HEADER + samples * _ENTRY + capacity)
    os.replace(part, path)
    return True


def _remove_unused(path: Path, limit_bytes: int) -> None:
    """Remove files that no process uses.

    These are all files from before the host's last start, and idle files until the others have at most `limit_bytes`.
    """
    boot = path.name.partition("-")[2]
    files = sorted(_cache_files(path.parent), key=lambda file: file.stat().st_mtime)
    total_bytes = sum(file.stat().st_size for file in files)
    for file in files:
        status = file.stat()
        current = file.name.partition("-")[2] == boot
        if current and (time.time() - status.st_mtime < IDLE_SECONDS or total_bytes <= limit_bytes):
            continue
        with contextlib.suppress(OSError), open(file, "rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if it is in use
            file.unlink()
            total_bytes -= status.st_size
            file.with_name(file.name + ".lock").unlink(missing_ok=True)


def _cache_files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix != ".lock"]
