"""The manifest of a shard set: one row per sample, checked against dataset.json.

A large manifest is converted once per host, into a folder of files that every process maps; later openings read
nothing of it in advance. A small one is held in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import numpy as np
import pyarrow as pa
from filelock import FileLock
from numpy.typing import NDArray

from t2idist import storage
from t2idist.data.manifest_rows import COLUMNS, DESCRIPTION, MANIFEST, NUMBERS, TEXTS, Shard, checked_parts

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONVERTED_ABOVE_BYTES = 16 << 20
"""Larger manifests are converted into files that are mapped."""

_CONVERSION = 1
"""Changes with the format of the converted files."""
_TEXTS_FILE, _CONTENTS_FILE = "texts.arrow", "contents.json"
_BLOCK_BYTES = 64 << 20
_warned: set[Path] = set()


@dataclass(frozen=True)
class Rows:
    """The manifest's columns of n consecutive samples, in memory or mapped."""

    numbers: Mapping[str, NDArray[Any]]
    """(n,) each: offsets, lengths, class_ids (a sample without a class has its own index in its split), has_class,
    widths, heights."""
    texts: pa.Table
    """key, sha256, captions, attributes."""

    def slice(self, start: int, count: int) -> Rows:
        numbers = {name: values[start : start + count] for name, values in self.numbers.items()}
        return Rows(numbers, self.texts.slice(start, count))

    def take(self, rows: NDArray[np.int64]) -> Rows:
        return Rows({name: values[rows] for name, values in self.numbers.items()}, self.texts.take(rows))


class Cells:
    """The values of a column that is stored in several pieces; made when asked for."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.pieces = [piece for piece in column.chunks if len(piece)]
        self._ends = list(accumulate(len(piece) for piece in self.pieces))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def at(self, index: int) -> Any:
        """Return the value at an index; a negative one counts from the end."""
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(index)
        piece = bisect_right(self._ends, index)
        return self.pieces[piece][index - self._ends[piece] + len(self.pieces[piece])].as_py()


class Keys(Sequence[str]):
    """The keys of a split's samples, without a Python object for each."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._cells = Cells(column)

    def __len__(self) -> int:
        return len(self._cells)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._cells.at(i) for i in range(*index.indices(len(self)))]
        key: str = self._cells.at(index)
        return key

    def __iter__(self) -> Iterator[str]:
        for piece in self._cells.pieces:
            for first in range(0, len(piece), 1024):
                yield from piece.slice(first, 1024).to_pylist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Keys | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"Keys({list(self[:3])}{'...' if len(self) > 3 else ''}, {len(self)} in all)"


class _DiskError(Exception):
    """The local disk cannot be written."""


@dataclass(frozen=True)
class _Manifest:
    """Where a manifest is, and what dataset.json says of it."""

    url: str
    endpoint_url: str | None
    size_bytes: int
    sha256: str
    shards: Mapping[str, Sequence[Shard]]

    @property
    def where(self) -> str:
        return storage.redact(self.url)

    def check_size(self) -> None:
        size_bytes = self._unless_missing(lambda: storage.size(self.url, endpoint_url=self.endpoint_url))
        if size_bytes != self.size_bytes:
            raise self.differs(size_bytes)

    def differs(self, size_bytes: int) -> ValueError:
        return ValueError(
            f"{self.where}: its {size_bytes} bytes are not those that {DESCRIPTION} describes "
            f"({self.size_bytes} bytes, hash)"
        )

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        return self._unless_missing(lambda: storage.read_bytes(self.url, start, end, endpoint_url=self.endpoint_url))

    def _unless_missing(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except FileNotFoundError:
            raise ValueError(f"{self.where}: missing, though {DESCRIPTION} names it") from None


def read_manifest(
    url: str,
    size_bytes: int,
    sha256: str,
    shards: Mapping[str, Sequence[Shard]],
    *,
    endpoint_url: str | None = None,
    cache: Path,
) -> Rows:
    """Read the manifest of the shard set at `url`; every row is checked, at latest when it is converted.

    Args:
        url: Folder of the shard set.
        size_bytes, sha256: Of the manifest, by dataset.json.
        shards: The shards of each split, by dataset.json.
        endpoint_url: Of the object store (None: the environment's).
        cache: Folder for large manifests that are converted, one folder each.

    Raises:
        ValueError: If it is missing, differs from dataset.json, or has rows that are not allowed.
    """
    manifest = _Manifest(storage.join(url, MANIFEST), endpoint_url, size_bytes, sha256, shards)
    if isinstance(size_bytes, int) and size_bytes > CONVERTED_ABOVE_BYTES:
        manifest.check_size()
        try:
            return _map(manifest, cache)
        except _DiskError as error:
            if cache not in _warned:
                _warned.add(cache)
                logger.warning("%s: every process holds it in memory, as %s: %s", manifest.where, cache, error)
    data = manifest.read()
    if len(data) != size_bytes or storage.sha256(data) != sha256:
        raise manifest.differs(len(data))
    parts = list(checked_parts(manifest.where, manifest.shards, pa.BufferReader(data)))
    numbers = {
        name: np.concatenate([np.zeros(0, dtype), *(part[name] for part, _ in parts)])
        for name, dtype in NUMBERS.items()
    }
    empty = pa.schema([COLUMNS.field(name) for name in TEXTS]).empty_table()
    return Rows(numbers, pa.concat_tables([empty, *(texts for _, texts in parts)]))


# ------------------------------------------------------------------------------------------------ converted manifests
def _map(manifest: _Manifest, cache: Path) -> Rows:
    """Map the converted manifest, converting it first if no process of this host has done so."""
    shards = {split: [asdict(shard) for shard in of_split] for split, of_split in manifest.shards.items()}
    identity = json.dumps([_CONVERSION, manifest.sha256, shards])
    folder = cache / storage.sha256(identity.encode())
    rows = _open_converted(folder)
    if rows is not None:
        return rows
    lock = FileLock(cache / f"{folder.name}.lock")
    with _disk_errors():
        cache.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        rows = _open_converted(folder)
        if rows is None:
            _convert(manifest, folder)
            rows = _open_converted(folder)
        if rows is None:
            raise _DiskError(f"{folder} does not hold what was written")
        return rows
    finally:
        lock.release()


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _DiskError(f"{type(error).__name__}: {error}") from None


def _open_converted(folder: Path) -> Rows | None:
    """Map a converted manifest; None if it is absent or not whole."""
    try:
        contents = json.loads((folder / _CONTENTS_FILE).read_bytes())
        if any((folder / name).stat().st_size != size for name, size in contents["files"].items()):
            return None
        numbers = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in NUMBERS}
        texts = pa.ipc.open_file(pa.memory_map(str(folder / _TEXTS_FILE))).read_all()
        whole = texts.schema.names == list(TEXTS) and all(
            values.shape == (len(texts),) and values.dtype == NUMBERS[name] for name, values in numbers.items()
        )
        return Rows(numbers, texts) if whole and len(texts) == contents["rows"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None


def _convert(manifest: _Manifest, folder: Path) -> None:
    """Write the converted manifest; `folder` appears when it is whole."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    logger.info("%s: converting it into %s, once on this host", manifest.where, folder)
    try:
        with _disk_errors():
            for left_over in (unfinished, folder):
                shutil.rmtree(left_over, ignore_errors=True)
            unfinished.mkdir()
        with _open_manifest(manifest, unfinished) as file:
            rows = sum(shard.samples for of_split in manifest.shards.values() for shard in of_split)
            _write_parts(unfinished, rows, checked_parts(manifest.where, manifest.shards, file))
        with _disk_errors():
            files = {name: (unfinished / name).stat().st_size for name in (_TEXTS_FILE, *map("{}.npy".format, NUMBERS))}
            with open(unfinished / _CONTENTS_FILE, "wb") as contents:
                contents.write(json.dumps({"rows": rows, "files": files}).encode())
                os.fsync(contents.fileno())
            os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        pa.default_memory_pool().release_unused()


@contextlib.contextmanager
def _open_manifest(manifest: _Manifest, folder: Path) -> Iterator[IO[bytes]]:
    """Open the manifest as a local file whose hash is right; one in an object store is copied to `folder` first."""
    path = storage.local_path(manifest.url)
    if path is None:
        path = folder / MANIFEST
        with contextlib.ExitStack() as stack:
            with _disk_errors():
                copy = stack.enter_context(open(path, "wb"))
            for start in range(0, manifest.size_bytes, _BLOCK_BYTES):
                block = manifest.read(start, start + _BLOCK_BYTES)
                with _disk_errors():
                    copy.write(block)
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != manifest.sha256:
            raise manifest.differs(path.stat().st_size)
        file.seek(0)
        yield file
    if path.parent == folder:
        path.unlink()


def _write_parts(folder: Path, rows: int, parts: Iterator[tuple[dict[str, NDArray[Any]], pa.Table]]) -> None:
    with contextlib.ExitStack() as stack:
        with _disk_errors():
            arrays = {name: stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in NUMBERS}
            for name, file in arrays.items():
                header = {"descr": np.dtype(NUMBERS[name]).str, "fortran_order": False, "shape": (rows,)}
                np.lib.format.write_array_header_1_0(file, header)
            texts_file = stack.enter_context(open(folder / _TEXTS_FILE, "wb"))
            writer = pa.ipc.new_file(texts_file, pa.schema([COLUMNS.field(name) for name in TEXTS]))
        for numbers, texts in parts:
            with _disk_errors():
                writer.write_table(texts)
                for name, file in arrays.items():
                    file.write(np.ascontiguousarray(numbers[name], NUMBERS[name]).data)
        with _disk_errors():
            writer.close()
            for file in (texts_file, *arrays.values()):
                file.flush()
                os.fsync(file.fileno())
