"""Read tables of images and captions row by row: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import itertools
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from t2idist import storage
from t2idist.ingest.annotations import Annotation
from t2idist.ingest.fields import SPLIT_FIELD, Fields
from t2idist.ingest.files import UndecodableText, file_size, is_image, read_lines, undecodable_part
from t2idist.ingest.flags import attributes_present, is_flag
from t2idist.ingest.listing import Listing
from t2idist.ingest.parquet_file import ParquetFile
from t2idist.ingest.rejects import Effect, Reason, Reject

_BATCH_ROWS = 1024
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
    """None: `split`, if there is one; '': there is none."""
    flags: tuple[str, ...] = ()
    """Columns of 1 and 0, each with the name of an attribute; ALL_FLAGS: all that hold 1 and 0."""

    def named(self) -> dict[str, str]:
        """Return the names of the columns for one field each, by field."""
        return {kind: name for kind, name in vars(self).items() if kind != "flags" and name}

    def flags_named(self) -> tuple[str, ...]:
        """Return the names of the columns of flags, as far as they are given."""
        return () if self.all_flags else self.flags

    def with_usual_split(self, header: Sequence[str]) -> Columns:
        """Return these columns, with the usual one of splits if no other is named and the table has it."""
        return replace(self, split=SPLIT_FIELD) if self.split is None and SPLIT_FIELD in header else self

    def fields(self) -> Fields:
        return Fields(self.image, self.caption or "", self.attributes, self.class_name, self.split or "")

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
    columns = columns.with_usual_split(header)
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
        yield from _annotations(location, row, columns.fields(), present, listing)


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
    with ParquetFile(url) as file:
        _check_columns(url, columns, file.schema.names)
        columns = columns.with_usual_split([field.name for field in file.schema if _is_text(field.type)])
        for kind, column in columns.named().items():
            _check_type(url, column, file.schema.field(column).type, kind)
        names = list(dict.fromkeys([*columns.named().values(), *columns.flags_named()]))
        if columns.all_flags:
            simple = [field.name for field in file.schema if _is_simple(field.type)]
            names = list(dict.fromkeys([*names, *simple]))
        rows = ((f"{name}, row {number}", row) for number, row in enumerate(file.rows(names, _BATCH_ROWS), start=1))
        yield from _to_annotations(name, columns, names, rows, listing)


def _is_simple(column_type: Any) -> bool:
    """Check whether a column can hold flags."""
    kinds = ("is_boolean", "is_integer", "is_floating", "is_string", "is_large_string", "is_dictionary")
    return any(getattr(pa.types, kind)(column_type) for kind in kinds)


def _check_type(url: str, column: str, column_type: Any, kind: str) -> None:
    is_list = pa.types.is_list(column_type) or pa.types.is_large_list(column_type)
    inner = column_type.value_type if is_list else column_type
    if not (_is_text(inner) or (kind in ("class_name", "image") and pa.types.is_integer(inner))):
        raise ValueError(f"{storage.redact(url)}: column '{column}' has type {column_type}; it must hold strings")


def _is_text(column_type: Any) -> bool:
    inner = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner))


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


def _annotations(
    location: str, row: dict[str, Any], fields: Fields, present: list[str], listing: Listing
) -> Iterator[Annotation]:
    image = row[fields.image or ""]
    image = str(image) if isinstance(image, int) else image
    if not isinstance(image, str) or not image:
        listing.exclude("", location, Reason.MALFORMED, "the image name is missing")
        return
    try:
        facts = fields.read(row, listing.attributes, present)
    except UndecodableText as error:
        listing.exclude("", location, Reason.INVALID_UTF8, str(error))
        return
    except ValueError as error:
        listing.exclude("", location, Reason.MALFORMED, str(error)[:200])
        return
    problems = {caption: undecodable_part([caption]) for caption in facts.captions}
    for problem in filter(None, problems.values()):
        detail = f"{location}: {problem}"
        listing.reject(Reject(facts.split or "", image, Reason.INVALID_UTF8, Effect.CAPTION_EXCLUDED, detail))
    captions = [caption for caption in facts.captions if problems[caption] is None]
    yield Annotation(location, image, captions, facts.attributes, facts.class_name, facts.split)
