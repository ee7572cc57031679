"""Read a Parquet file, on disk or in an object store, as Python values, a few rows at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from t2idist import storage
from t2idist.ingest.stored_file import open_file

_BUFFER_BYTES = 1 << 20


class ParquetFile:
    """A Parquet file. Use it as a context manager, which closes it.

    Raises:
        ValueError: it is missing or damaged, when it is opened and when it is read. Errors of the disk or of the
            network stay as they are.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._source = _Source(open_file(url))
        try:
            with self._damage_named():
                self._file = pq.ParquetFile(self._source, buffer_size=_BUFFER_BYTES)
                self.schema: pa.Schema = self._file.schema_arrow
        except BaseException:
            self._source.close()
            raise
        self.metadata: pq.FileMetaData = self._file.metadata

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._source.close()

    def rows(self, columns: Sequence[str], batch_rows: int) -> Iterator[dict[str, Any]]:
        """Yield the rows, by column. One iterator over all row groups would keep the memory of each of them."""
        for group in range(self._file.num_row_groups):
            batches = self._file.iter_batches(batch_rows, row_groups=[group], columns=list(columns))
            while True:
                with self._damage_named():
                    batch = next(batches, None)
                    values = [] if batch is None else [python_values(batch.column(column)) for column in columns]
                if batch is None:
                    break
                for row in zip(*values, strict=True):
                    yield dict(zip(columns, row, strict=True))

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        """Turn errors of the content into ValueError; Arrow raises OSError for them. Errors of reading it stay."""
        try:
            yield
        except (pa.ArrowException, EOFError, OSError) as error:
            if error is self._source.error:
                raise
            raise ValueError(f"{storage.redact(self._url)}: not a readable parquet file: {str(error)[:200]}") from None


class _Source:
    """A file object for Arrow that keeps the error of a read that failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def python_values(column: pa.Array) -> list[Any]:
    """Convert a column to Python values; in texts, bytes that are not UTF-8 become surrogates."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return python_values(column.dictionary_decode())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [value if value is None else _text(value) for value in column.cast(pa.large_binary()).to_pylist()]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        items = iter(python_values(column.flatten()))
        lengths = column.value_lengths().to_pylist()
        return [length if length is None else [next(items) for _ in range(length)] for length in lengths]
    if pa.types.is_struct(kind) and kind.num_fields:
        names = [kind.field(index).name for index in range(kind.num_fields)]
        rows = zip(*map(python_values, column.flatten()), strict=True)
        present = column.is_valid().to_pylist()
        return [dict(zip(names, row, strict=True)) if valid else None for valid, row in zip(present, rows, strict=True)]
    values: list[Any] = column.to_pylist()
    return values


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
