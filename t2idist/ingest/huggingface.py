"""Reader for image folders of Hugging Face: metadata.jsonl, .csv or .parquet with `file_name`, at any level."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from t2idist import storage
from t2idist.ingest.annotations import Annotation
from t2idist.ingest.fields import Fields, require_captions
from t2idist.ingest.files import UndecodableText, is_unsafe, read_lines, text_of_line
from t2idist.ingest.flags import parse_attributes
from t2idist.ingest.folder import FolderOptions, list_annotated
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason
from t2idist.ingest.splits import split_of_word
from t2idist.ingest.stored_file import open_file
from t2idist.ingest.tables import Columns, table_rows

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"


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
    return name in _field_names(url, name)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _rows(root: str, name: str, listing: Listing, fields: Fields, needs_captions: bool) -> Iterator[Annotation]:
    """Yield the annotations of one metadata file, with names relative to `root`."""
    url, folder = storage.join(root, name), _folder(name)
    rows = _json_rows(url, name, listing, fields, needs_captions)
    if not name.lower().endswith(".jsonl"):
        rows = _table_rows(url, listing, fields, needs_captions)
    for row in rows:
        if folder and not is_unsafe(row.name):  # the reader of annotations rejects the others
            row = replace(row, name=f"{folder}/{row.name}")
        yield replace(row, split=row.split and (split_of_word(row.split) or row.split))


def _table_rows(url: str, listing: Listing, fields: Fields, needs_captions: bool) -> Iterator[Annotation]:
    names = _field_names(url, fields.image or FILE_NAME)
    if needs_captions:
        require_captions(storage.redact(url), fields, names)
    columns = Columns(
        image=fields.image or FILE_NAME,
        caption=fields.caption_name(names),
        attributes=fields.attributes,
        class_name=fields.class_name,
        split=fields.split or ("split" if "split" in names else None),
    )
    yield from table_rows(url, columns, listing)


def _field_names(url: str, wanted: str) -> list[str]:
    """Return the names of the columns, or the keys of the first object. `wanted` tells how a table is separated."""
    try:
        if url.lower().endswith(".parquet"):
            with open_file(url) as file:
                return list(pq.read_schema(file).names)
        line = next((line for _, line in read_lines(url) if line.strip()), b"")
        if url.lower().endswith(".csv"):
            headers = [next(csv.reader([line.decode("utf-8", "replace")], delimiter=each), []) for each in ",;\t|"]
            return next((header for header in headers if wanted in header), headers[0])
        first = json.loads(line.decode("utf-8", "surrogateescape") or "{}")
        return list(first) if isinstance(first, dict) else []
    except (pa.ArrowException, csv.Error, ValueError, RecursionError):
        return []


def _json_rows(url: str, name: str, listing: Listing, fields: Fields, needs_captions: bool) -> Iterator[Annotation]:
    """Yield the annotations of a metadata.jsonl; invalid lines become rejects."""
    rows = captioned = 0
    for number, line in read_lines(url):
        if not line.strip():
            continue
        location = f"{name}, line {number}"
        try:
            row = _parse(location, json.loads(text_of_line(line)), fields, listing.attributes)
        except UndecodableText as error:
            listing.exclude("", location, Reason.INVALID_UTF8, str(error))
        except (ValueError, RecursionError) as error:
            listing.exclude("", location, Reason.MALFORMED, str(error)[:200])
        else:
            rows += 1
            captioned += bool(row.captions)
            yield row
    if rows and needs_captions and not captioned:
        require_captions(storage.redact(url), fields, _field_names(url, FILE_NAME))


def _parse(location: str, value: object, fields: Fields, seen: dict[str, bool]) -> Annotation:
    image_field = fields.image or FILE_NAME
    if not isinstance(value, dict) or not isinstance(value.get(image_field), str):
        raise ValueError(f'the line must be an object with "{image_field}", the name of an image')
    attributes = value.get(fields.attributes, []) if fields.attributes else []
    attributes = parse_attributes(attributes, fields.attributes or "attributes", seen)
    split = value.get(fields.split or "split")
    if not isinstance(split, str | None):
        raise ValueError(f"'{fields.split or 'split'}' must be a string")
    attributes = [name.encode("utf-8", "replace").decode() for name in attributes]
    return Annotation(
        location, value[image_field], fields.captions(value), attributes, fields.class_of(value), split or None
    )
