"""Reader for image folders of Hugging Face: metadata.jsonl, .csv or .parquet with `file_name`, at any level."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from t2idist import storage
from t2idist.ingest.annotations import Annotation, read_jsonl
from t2idist.ingest.fields import Fields, require_captions
from t2idist.ingest.files import is_unsafe, read_lines
from t2idist.ingest.folder import FolderOptions, list_annotated
from t2idist.ingest.listing import Listing
from t2idist.ingest.parquet_file import ParquetFile
from t2idist.ingest.tables import Columns, table_rows

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"
_SNIFFED_LINES = 10
_FIELDS = Fields(image=FILE_NAME, split="split")


def list_image_folder(
    root: str, metadata: Sequence[str], listing: Listing, options: FolderOptions, fields: Fields
) -> str:
    """List the images of an image folder. Returns a sentence about the splits.

    Args:
        metadata: names of the metadata files, relative to `root`. Each names images relative to its own folder.

    Raises:
        ValueError: a folder has two metadata files, or one lacks a column.
    """
    folders = [_folder(name) for name in metadata]
    for folder, name in zip(folders, metadata, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(
                f"{storage.redact(storage.join(root, name))}: its folder has several metadata files; keep one of them"
            )
    rows = (row for name in metadata for row in _rows(root, name, listing, fields, options.needs_captions))
    return list_annotated(root, rows, listing, options)


def has_file_names(url: str, fields: Fields) -> bool:
    """Check whether a metadata file names images by `file_name`, or the field that is given for it."""
    name = fields.image or FILE_NAME
    return name in field_names(url, name)


def _keys_of_lines(url: str) -> list[str]:
    """Return the keys of the first lines that are objects; the reader rejects the others."""
    keys: dict[str, None] = {}
    for line in itertools.islice((line for _, line in read_lines(url) if line.strip()), _SNIFFED_LINES):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line.decode("utf-8", "surrogateescape"))
            keys |= dict.fromkeys(value if isinstance(value, dict) else ())
    return list(keys)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _rows(root: str, name: str, listing: Listing, fields: Fields, needs_captions: bool) -> Iterator[Annotation]:
    """Yield the annotations of one metadata file, with names relative to `root`."""
    url, folder = storage.join(root, name), _folder(name)
    if name.lower().endswith(".jsonl"):
        rows = read_jsonl(url, listing, fields, usual=_FIELDS, name=name, needs_captions=needs_captions)
    else:
        rows = _table_rows(url, listing, fields, needs_captions)
    for row in rows:
        if folder and not is_unsafe(row.name):  # the reader of annotations rejects the others
            row = replace(row, name=f"{folder}/{row.name}")
        yield row


def _table_rows(url: str, listing: Listing, fields: Fields, needs_captions: bool) -> Iterator[Annotation]:
    names = field_names(url, fields.image or FILE_NAME)
    if needs_captions:
        require_captions(storage.redact(url), fields, names)
    columns = Columns(
        image=fields.image or FILE_NAME,
        caption=fields.caption_name(names),
        attributes=fields.attributes,
        class_name=fields.class_name,
        split=fields.split,
    )
    yield from table_rows(url, columns, listing)


def field_names(url: str, *wanted: str) -> list[str]:
    """Return the names of the columns, or the keys of the first object; none if the file is not of its kind.

    Args:
        wanted: one of these names tells how a table is separated.
    """
    try:
        if url.lower().endswith(".parquet"):
            with ParquetFile(url) as file:
                return list(file.schema.names)
        line = next((line for _, line in read_lines(url) if line.strip()), b"")
        if not url.lower().endswith(".jsonl"):
            headers = [next(csv.reader([line.decode("utf-8", "replace")], delimiter=each), []) for each in ",;\t|"]
            return next((header for header in headers if set(wanted) & set(header)), headers[0])
        return _keys_of_lines(url)
    except (csv.Error, ValueError, RecursionError):
        return []
