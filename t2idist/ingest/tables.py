"""Tables of pictures and captions: CSV, TSV and Parquet, row by row."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t2idist import storage
from t2idist.ingest.annotations import Annotation
from t2idist.ingest.files import lines, size_of
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason

_BATCH_ROWS = 1024
_MAX_PARQUET_BYTES = 8 << 30
_SEPARATORS = re.compile(r"[,;|]")


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None: there is none of that kind."""

    image: str = "image"
    caption: str | None = "caption"
    attributes: str | None = None
    class_name: str | None = None
    split: str | None = None

    def named(self) -> dict[str, str]:
        """Name of the column by what it is for."""
        every = {item.name: self.__dict__[item.name] for item in fields(self)}
        return {kind: name for kind, name in every.items() if name is not None}


def table_rows(url: str, columns: Columns, listing: Listing) -> Iterator[Annotation]:
    """The rows of a table; those that are not right become rejects. Raises ValueError for another kind of file."""
    name = url.rsplit("/", 1)[-1]
    if name.lower().endswith(".parquet"):
        yield from _parquet_rows(url, name, columns, listing)
    elif name.lower().endswith((".csv", ".tsv")):
        yield from _csv_rows(url, name, columns, listing, "\t" if name.lower().endswith(".tsv") else ",")
    else:
        raise ValueError(f"--table {storage.redact(url)}: allowed are .csv, .tsv and .parquet")


def _csv_rows(url: str, name: str, columns: Columns, listing: Listing, delimiter: str) -> Iterator[Annotation]:
    size_of(url)
    at = 0

    def text() -> Iterator[str]:
        nonlocal at
        for number, line in lines(url):
            at = number
            yield line.decode("utf-8", "surrogateescape")

    rows = csv.reader(text(), delimiter=delimiter)
    header: list[str] | None = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:  # such as a field of more than 128 KiB; the reader goes on with the next line
            listing.left_out("", f"{name}, line {at}", Reason.MALFORMED, str(error))
            continue
        if header is None:
            header = row
            _check(url, columns, header)
        elif row and len(row) != len(header):
            detail = f"{len(row)} fields; the header has {len(header)}"
            listing.left_out("", f"{name}, line {at}", Reason.MALFORMED, detail)
        elif row:
            values = dict(zip(header, row, strict=True))
            found = {kind: values[column] for kind, column in columns.named().items()}
            yield from _remark(f"{name}, line {at}", found, listing)
    if header is None:
        raise ValueError(f"{storage.redact(url)}: the table is empty")


def _parquet_rows(url: str, name: str, columns: Columns, listing: Listing) -> Iterator[Annotation]:
    path = storage.local_path(url)
    if size_of(url) > _MAX_PARQUET_BYTES:
        raise ValueError(f"{storage.redact(url)}: more than {_MAX_PARQUET_BYTES} bytes; is it a table of names?")
    try:
        file = pq.ParquetFile(path if path is not None else pa.BufferReader(storage.read_bytes(url)))
        _check(url, columns, file.schema_arrow.names)
        named = columns.named()
        for kind, column in named.items():
            _check_type(url, column, file.schema_arrow.field(column).type, kind)
        number = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=list(named.values())):
            values = {kind: _values(batch.column(column)) for kind, column in named.items()}
            for row in range(batch.num_rows):
                number += 1
                yield from _remark(f"{name}, row {number}", {kind: of[row] for kind, of in values.items()}, listing)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{storage.redact(url)}: not a readable parquet file: {str(error)[:200]}") from None


def _check_type(url: str, column: str, of_type: Any, kind: str) -> None:
    inner = of_type.value_type if pa.types.is_list(of_type) or pa.types.is_large_list(of_type) else of_type
    if pa.types.is_dictionary(inner):
        inner = inner.value_type
    text = pa.types.is_string(inner) or pa.types.is_large_string(inner)
    if not (text or (kind == "class_name" and pa.types.is_integer(inner))):
        raise ValueError(f"{storage.redact(url)}: column '{column}' holds {of_type}; it must hold texts")


def _values(column: Any) -> list[Any]:
    """Texts whose bytes are no UTF-8 come with surrogates in place of these."""
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


def _check(url: str, columns: Columns, header: list[str]) -> None:
    for kind, column in columns.named().items():
        if column not in header:
            option = f"--{kind.removesuffix('_name').replace('_', '-')}-column"
            raise ValueError(
                f"{storage.redact(url)}: no column '{column}' ({option}); there are {', '.join(map(repr, header[:20]))}"
            )


def _remark(where: str, found: dict[str, Any], listing: Listing) -> Iterator[Annotation]:
    image = found["image"]
    if not isinstance(image, str) or not image:
        listing.left_out("", where, Reason.MALFORMED, "no name of a picture")
        return
    caption = found.get("caption")
    captions = caption if isinstance(caption, list) else [] if caption is None else [caption]
    attributes = found.get("attributes") or []
    if isinstance(attributes, str):
        attributes = [part.strip() for part in _SEPARATORS.split(attributes) if part.strip()]
    class_name, split = found.get("class_name"), found.get("split")
    yield Annotation(
        where, image, [text for text in captions if text is not None],
        [str(name).encode("utf-8", "replace").decode() for name in attributes],
        None if class_name in (None, "") else str(class_name), split or None,
    )  # fmt: skip
