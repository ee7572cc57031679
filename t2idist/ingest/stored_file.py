"""Files on disk or in an object store as Python file objects, read block by block in bounded memory."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import IO, Any

from t2idist import storage
from t2idist.ingest.files import file_size

_BLOCK_BYTES = storage.BLOCK_BYTES
_BLOCKS_AHEAD = 4
_BLOCKS_KEPT = 12
_LFS = b"version https://git-lfs.github.com/spec/"


def open_file(url: str) -> IO[bytes]:
    """Open a file to read it from any position.

    Raises:
        ValueError: it is missing, or it is the pointer that Git leaves in place of a large file.
    """
    size_bytes = file_size(url)
    if storage.read_bytes(url, 0, min(size_bytes, len(_LFS))) == _LFS:
        raise ValueError(
            f"{storage.redact(url)}: is a pointer of Git LFS, not the file; run `git lfs pull` where it was cloned"
        )
    path = storage.local_name(url)
    return open(path, "rb") if path is not None else io.BufferedReader(_StoredFile(url, size_bytes))


class _StoredFile(io.RawIOBase):
    """An object of a store. The last few blocks are kept: a Parquet file is read at a position per column."""

    def __init__(self, url: str, size_bytes: int) -> None:
        self._url = url
        self._size_bytes = size_bytes
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size_bytes)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read up to the end of the block."""
        number, skipped = divmod(self._position, _BLOCK_BYTES)
        view = memoryview(buffer).cast("B")
        if not len(view) or self._position >= self._size_bytes:
            return 0
        data = self._block(number)[skipped : skipped + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start, count = number * _BLOCK_BYTES, _BLOCKS_AHEAD if number - 1 in self._blocks else 1
            end = min(self._size_bytes, start + count * _BLOCK_BYTES)
            data = storage.read_bytes(self._url, start, end)
            if len(data) != end - start:
                raise OSError(
                    f"{storage.redact(self._url)}: {len(data)} bytes came instead of {end - start}; the file "
                    "changed, or its server does not support range requests"
                )
            for index in range(count):
                self._blocks[number + index] = data[index * _BLOCK_BYTES : (index + 1) * _BLOCK_BYTES]
                self._blocks.move_to_end(number + index)
            while len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]
