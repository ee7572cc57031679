"""Read tables of images and captions row by row: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import itertools
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t2idist import storage
from t2idist.ingest.annotations import Annotation
from t2idist.ingest.files import file_size, is_image, read_lines, undecodable_part
from t2idist.ingest.flags import attributes_present, is_flag
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Effect, Reason, Reject

_BATCH_ROWS = 1024
_MAX_PARQUET_BYTES = 8 << 30
_SEPARATORS = re.compile(r"[,;|]")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_STATED_DELIMITER = re.compile(r'"?sep=([,;\t|])"?\s*')  # Excel writes and reads such a first line
_SNIFFED_ROWS = 1000
_WRONG_SHARE = 0.1
ALL_FLAGS = ("all",)


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table; None: there is no such column."""

    image: str = "image"
    caption: str | None = "caption"
    attributes: str | None = None
    class_name: str | None = None
    split: str | None = None
    flags: tuple[str, ...] = ()
    """Columns of 1 and 0, each with the name of an attribute; ALL_FLAGS: all that hold 1 and 0."""

    def named(self) -> dict[str, str]:
        """Return the names of the columns for one field each, by field."""
        return {kind: name for kind, name in vars(self).items() if kind != "flags" and name is not None}

    def flags_named(self) -> tuple[str, ...]:
        """Return the names of the columns of flags, as far as they are given."""
        return () if self.all_flags else self.flags

    @property
    def all_flags(self) -> bool:
        return self.flags == ALL_FLAGS


def table_rows(url: str, columns: Columns, listing: Listing) -> Iterator[Annotation]:
    """Yield the annotations of a table; invalid rows become rejects. Raises ValueError if it is not a table."""
    name = url.rsplit("/", 1)[-1]
    lower = name.lower()
    if lower.endswith(".parquet"):
        yield from _parquet_rows(url, name, columns, listing)
    elif lower.endswith((".csv", ".tsv", ".tab", ".txt")):
        yield from _csv_rows(url, name, columns, listing, "\t" if lower.endswith((".tsv", ".tab")) else ",")
    else:
        raise ValueError(f"--table {storage.redact(url)}: allowed are .csv, .tsv and .parquet, and .txt in their form")


def _csv_rows(url: str, name: str, columns: Columns, listing: Listing, delimiter: str) -> Iterator[Annotation]:
    records = _csv_records(url, name, columns, listing, delimiter)
    header = next(records, ("", []))[1]
    _check_columns(url, columns, header)
    rows = ((location, dict(zip(header, values, strict=True))) for location, values in records)
    yield from _to_annotations(name, columns, header, rows, listing)


def _csv_records(
    url: str, name: str, columns: Columns, listing: Listing, delimiter: str
) -> Iterator[tuple[str, list[str]]]:
    """Yield the header and then the complete rows, each with its location."""
    file_size(url)
    lines = _Lines(url)
    first = next(lines, None)
    stated = first and _STATED_DELIMITER.fullmatch(first)
    if stated:
        first = next(lines, None)
    if first is None:
        raise ValueError(f"{storage.redact(url)}: the table is empty")
    dialect = _Dialect(stated.group(1), False) if stated else _sniff(first, delimiter, columns)
    if dialect.delimiter != delimiter:
        listing.notes.append(f"{name}: the fields are separated by {_DELIMITERS[dialect.delimiter]}")
    lines.read_again_from(-1)
    rows = csv.reader(lines, delimiter=dialect.delimiter, skipinitialspace=dialect.spaced)
    header: list[str] | None = None
    while True:
        lines.taken.clear()
        row, problem = list[str](), ""
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:  # for example a field of more than 128 KiB; the reader continues with the next line
            problem = str(error)
        if header is not None and (swallowed := _swallowed_row(lines.taken, header, dialect, columns)) is not None:
            number, text = swallowed
            detail = f"its quote is not closed before line {number}, which names another image: {text.strip()!r:.80}"
            listing.exclude("", f"{name}, line {lines.taken[0][0]}", Reason.MALFORMED, detail)
            lines.read_again_from(1)
            continue
        if dialect.spaced:
            row = [value.strip() for value in row]
        if problem:
            listing.exclude("", f"{name}, line {lines.number}", Reason.MALFORMED, problem)
        elif header is None:
            header = row
            yield "", header
        elif row and len(row) != len(header):
            detail = f"{len(row)} fields; the header has {len(header)}"
            listing.exclude("", f"{name}, line {lines.number}", Reason.MALFORMED, detail)
        elif row:
            yield f"{name}, line {lines.number}", row


class _Lines:
    """The lines of a text file, some of which may be read again."""

    def __init__(self, url: str) -> None:
        self._lines = read_lines(url)
        self._again: deque[tuple[int, str]] = deque()
        self.taken: list[tuple[int, str]] = []
        """The lines since it was cleared, with their numbers."""
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._again:
            numbered = self._again.popleft()
        else:
            number, line = next(self._lines)
            numbered = number, line.decode("utf-8", "surrogateescape")
        self.taken.append(numbered)
        self.number = numbered[0]
        return numbered[1]

    def read_again_from(self, position: int) -> None:
        """Return the lines from this position of `taken` to those that are still to be read."""
        self._again.extendleft(reversed(self.taken[position:]))


def _swallowed_row(
    taken: Sequence[tuple[int, str]], header: list[str], dialect: _Dialect, columns: Columns
) -> tuple[int, str] | None:
    """Return the line that a quote without an end has made a part of the row before it; None if there is none."""
    if len(taken) < 2:
        return None
    position = header.index(columns.image)
    own = _split(taken[0][1], dialect.delimiter)
    numbers = len(own) > position and own[position].strip().isdecimal()
    for number, line in taken[1:]:
        fields = _split(line, dialect.delimiter)
        if len(fields) == len(header):
            image = fields[position].strip()
            if is_image(image) or (numbers and image.isdecimal()):
                return number, line
    return None


@dataclass(frozen=True)
class _Dialect:
    delimiter: str
    spaced: bool
    """The names in the header, and so perhaps the values, have spaces around them."""


def _sniff(line: str, default: str, columns: Columns) -> _Dialect:
    """Find the delimiter with which the header has the columns that are named."""
    wanted = {*columns.named().values(), *columns.flags_named()}
    headers = {each: _split(line, each) for each in (default, *_DELIMITERS)}
    for spaced in (False, True):
        for delimiter, names in headers.items():
            if wanted <= {name.strip() if spaced else name for name in names}:
                return _Dialect(delimiter, spaced)
    most = max(headers, key=lambda each: len(headers[each]))  # the default, if several have as many
    return _Dialect(default if len(headers[default]) > 1 else most, False)


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _to_annotations(
    name: str, columns: Columns, header: list[str], rows: Iterator[tuple[str, dict[str, Any]]], listing: Listing
) -> Iterator[Annotation]:
    flags: Sequence[str] = columns.flags_named()
    if columns.all_flags:
        first = list(itertools.islice(rows, _SNIFFED_ROWS))
        flags = _find_flags(name, [each for each in header if each not in columns.named().values()], first, listing)
        rows = itertools.chain(first, rows)
    for location, row in rows:
        try:
            present = attributes_present(((flag, row[flag]) for flag in flags), listing.attributes)
        except ValueError as error:
            listing.exclude("", location, Reason.MALFORMED, str(error))
            continue
        yield from _annotations(location, {kind: row[each] for kind, each in columns.named().items()}, present, listing)


def _find_flags(
    name: str, candidates: list[str], rows: list[tuple[str, dict[str, Any]]], listing: Listing
) -> list[str]:
    """Return the columns that hold 1 and 0 in nearly all of the first rows; the listing gets a note about them."""
    flags, others = [], []
    for column in dict.fromkeys(candidates):
        wrong = [(location, row[column]) for location, row in rows if not is_flag(row[column])]
        if column.strip() and len(wrong) <= _WRONG_SHARE * len(rows) and rows:
            flags.append(column)
        else:
            others.append(f"'{column}' ({wrong[0][1]!r:.40} in {wrong[0][0]})" if wrong else f"'{column}'")
    if not flags:
        raise ValueError(
            f"{name}: no column holds 1 and 0 (--attribute-columns all); the others are {', '.join(others[:20])}"
        )
    left_out = f"; not attributes: {', '.join(others[:20])}" if others else ""
    listing.notes.append(f"{name}: {len(flags)} attributes: {', '.join(flags)}{left_out}")
    return flags


def _parquet_rows(url: str, name: str, columns: Columns, listing: Listing) -> Iterator[Annotation]:
    path = storage.local_path(url)
    if file_size(url) > _MAX_PARQUET_BYTES:
        raise ValueError(
            f"{storage.redact(url)}: larger than {_MAX_PARQUET_BYTES} bytes; the table must not contain the images"
        )
    try:
        file = pq.ParquetFile(path if path is not None else pa.BufferReader(storage.read_bytes(url)))
        _check_columns(url, columns, file.schema_arrow.names)
        for kind, column in columns.named().items():
            _check_type(url, column, file.schema_arrow.field(column).type, kind)
        names = list(dict.fromkeys([*columns.named().values(), *columns.flags_named()]))
        if columns.all_flags:
            simple = [field.name for field in file.schema_arrow if _is_simple(field.type)]
            names = list(dict.fromkeys([*names, *simple]))
        yield from _to_annotations(name, columns, names, _parquet_records(file, name, names), listing)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{storage.redact(url)}: not a readable parquet file: {str(error)[:200]}") from None


def _parquet_records(file: Any, name: str, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=names):
        values = {column: _values(batch.column(column)) for column in names}
        for row in range(batch.num_rows):
            number += 1
            yield f"{name}, row {number}", {column: of_rows[row] for column, of_rows in values.items()}


def _is_simple(column_type: Any) -> bool:
    """Check whether a column can hold flags."""
    kinds = ("is_boolean", "is_integer", "is_floating", "is_string", "is_large_string", "is_dictionary")
    return any(getattr(pa.types, kind)(column_type) for kind in kinds)


def _check_type(url: str, column: str, column_type: Any, kind: str) -> None:
    is_list = pa.types.is_list(column_type) or pa.types.is_large_list(column_type)
    inner = column_type.value_type if is_list else column_type
    if pa.types.is_dictionary(inner):
        inner = inner.value_type
    text = pa.types.is_string(inner) or pa.types.is_large_string(inner)
    if not (text or (kind in ("class_name", "image") and pa.types.is_integer(inner))):
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
    options = {f"--{kind.removesuffix('_name')}-column": column for kind, column in columns.named().items()}
    wanted = [*options.items(), *(("--attribute-columns", column) for column in columns.flags_named())]
    for option, column in wanted:
        if column not in header:
            if option == "--caption-column":
                option += "; without captions: --caption-column '' --allow-no-captions"
            raise ValueError(
                f"{storage.redact(url)}: no column '{column}' ({option}); columns: {', '.join(map(repr, header[:20]))}"
            )


def _annotations(location: str, values: dict[str, Any], present: list[str], listing: Listing) -> Iterator[Annotation]:
    image = values["image"]
    image = str(image) if isinstance(image, int) else image
    if not isinstance(image, str) or not image:
        listing.exclude("", location, Reason.MALFORMED, "the image name is missing")
        return
    caption = values.get("caption")
    captions = caption if isinstance(caption, list) else [] if caption is None else [caption]
    attributes = values.get("attributes") or []
    if isinstance(attributes, str):
        attributes = [part.strip() for part in _SEPARATORS.split(attributes) if part.strip()]
    class_name, split = values.get("class_name"), values.get("split")
    if (problem := undecodable_part([*map(str, (*attributes, *present, class_name, split))])) is not None:
        listing.exclude("", location, Reason.INVALID_UTF8, problem)
        return
    for text in captions:
        if text is not None and (problem := undecodable_part([text])) is not None:
            detail = f"{location}: {problem}"
            listing.reject(Reject(split or "", image, Reason.INVALID_UTF8, Effect.CAPTION_EXCLUDED, detail))
    yield Annotation(
        location, image, [text for text in captions if text is not None and undecodable_part([text]) is None],
        [str(name).encode("utf-8", "replace").decode() for name in (*attributes, *present)],
        None if class_name in (None, "") else str(class_name), split or None,
    )  # fmt: skip
