"""Read tables of images and captions row by row: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t2idist import storage
from t2idist.ingest.annotations import Annotation
from t2idist.ingest.files import file_size, read_lines
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason

_BATCH_ROWS = 1024
_MAX_PARQUET_BYTES = 8 << 30
_SEPARATORS = re.compile(r"[,;|]")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table; None: there is no such column."""

    image: str = "image"
    caption: str | None = "caption"
    attributes: str | None = None
    class_name: str | None = None
    split: str | None = None

    def named(self) -> dict[str, str]:
        """Return the column names that are set, by field."""
        return {kind: name for kind, name in vars(self).items() if name is not None}


def table_rows(url: str, columns: Columns, listing: Listing) -> Iterator[Annotation]:
    """Yield the annotations of a table; invalid rows become rejects. Raises ValueError if it is not a table."""
    name = url.rsplit("/", 1)[-1]
    if name.lower().endswith(".parquet"):
        yield from _parquet_rows(url, name, columns, listing)
    elif name.lower().endswith((".csv", ".tsv")):
        yield from _csv_rows(url, name, columns, listing, "\t" if name.lower().endswith(".tsv") else ",")
    else:
        raise ValueError(f"--table {storage.redact(url)}: allowed are .csv, .tsv and .parquet")


def _csv_rows(url: str, name: str, columns: Columns, listing: Listing, delimiter: str) -> Iterator[Annotation]:
    file_size(url)
    line_number = 0

    def text() -> Iterator[str]:
        nonlocal line_number
        for number, line in read_lines(url):
            line_number = number
            yield line.decode("utf-8", "surrogateescape")

    rows = csv.reader(text(), delimiter=delimiter)
    header: list[str] | None = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:  # for example a field of more than 128 KiB; the reader continues with the next line
            listing.exclude("", f"{name}, line {line_number}", Reason.MALFORMED, str(error))
            continue
        if header is None:
            header = row
            _check_columns(url, columns, header)
        elif row and len(row) != len(header):
            detail = f"{len(row)} fields; the header has {len(header)}"
            listing.exclude("", f"{name}, line {line_number}", Reason.MALFORMED, detail)
        elif row:
            values = dict(zip(header, row, strict=True))
            by_kind = {kind: values[column] for kind, column in columns.named().items()}
            yield from _annotations(f"{name}, line {line_number}", by_kind, listing)
    if header is None:
        raise ValueError(f"{storage.redact(url)}: the table is empty")


def _parquet_rows(url: str, name: str, columns: Columns, listing: Listing) -> Iterator[Annotation]:
    path = storage.local_path(url)
    if file_size(url) > _MAX_PARQUET_BYTES:
        raise ValueError(
            f"{storage.redact(url)}: larger than {_MAX_PARQUET_BYTES} bytes; the table must not contain the images"
        )
    try:
        file = pq.ParquetFile(path if path is not None else pa.BufferReader(storage.read_bytes(url)))
        _check_columns(url, columns, file.schema_arrow.names)
        named = columns.named()
        for kind, column in named.items():
            _check_type(url, column, file.schema_arrow.field(column).type, kind)
        number = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=list(named.values())):
            values = {kind: _values(batch.column(column)) for kind, column in named.items()}
            for row in range(batch.num_rows):
                number += 1
                by_kind = {kind: column[row] for kind, column in values.items()}
                yield from _annotations(f"{name}, row {number}", by_kind, listing)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{storage.redact(url)}: not a readable parquet file: {str(error)[:200]}") from None


def _check_type(url: str, column: str, column_type: Any, kind: str) -> None:
    is_list = pa.types.is_list(column_type) or pa.types.is_large_list(column_type)
    inner = column_type.value_type if is_list else column_type
    if pa.types.is_dictionary(inner):
        inner = inner.value_type
    text = pa.types.is_string(inner) or pa.types.is_large_string(inner)
    if not (text or (kind == "class_name" and pa.types.is_integer(inner))):
        raise ValueError(f"{storage.redact(url)}: column '{column}' has type {column_type}; it must hold strings")


def _values(column: Any) -> list[Any]:
    """Convert a column to Python values; bytes that are not UTF-8 become surrogates."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    if column.type in binary:
        column = column.cast(binary[column.type])
    elif pa.types.is_list(column.type) and column.type.value_type in binary:
        column = column.cast(pa.list_(binary[column.type.value_type]))
    elif pa.types.is_large_list(column.type) and column.type.value_type in binary:
        column = column.cast(pa.large_list(binary[column.type.value_type]))
    return [_text(value) for value in column.to_pylist()]


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return [_text(item) for item in value] if isinstance(value, list) else value


def _check_columns(url: str, columns: Columns, header: list[str]) -> None:
    for kind, column in columns.named().items():
        if column not in header:
            option = f"--{kind.removesuffix('_name').replace('_', '-')}-column"
            raise ValueError(
                f"{storage.redact(url)}: no column '{column}' ({option}); columns: {', '.join(map(repr, header[:20]))}"
            )


def _annotations(location: str, values: dict[str, Any], listing: Listing) -> Iterator[Annotation]:
    image = values["image"]
    if not isinstance(image, str) or not image:
        listing.exclude("", location, Reason.MALFORMED, "the image name is missing")
        return
    caption = values.get("caption")
    captions = caption if isinstance(caption, list) else [] if caption is None else [caption]
    attributes = values.get("attributes") or []
    if isinstance(attributes, str):
        attributes = [part.strip() for part in _SEPARATORS.split(attributes) if part.strip()]
    class_name, split = values.get("class_name"), values.get("split")
    yield Annotation(
        location, image, [text for text in captions if text is not None],
        [str(name).encode("utf-8", "replace").decode() for name in attributes],
        None if class_name in (None, "") else str(class_name), split or None,
    )  # fmt: skip
