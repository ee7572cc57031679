"""Reader for Parquet files with embedded images, as Hugging Face stores data sets.

A Parquet file is compressed, and the shards are not in its order. So its images are copied row by row into a temporary
file, from which they are read in the order of the shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from t2idist import storage
from t2idist.data.sample_format import MAX_FILE_BYTES
from t2idist.ingest.fields import IMAGE_FIELDS, SPLIT_FIELD, Fields, require_captions, require_named
from t2idist.ingest.files import ByteRange, UndecodableText
from t2idist.ingest.folder import OUTSIDE_SPLITS, FolderOptions, SplitChooser, number_classes
from t2idist.ingest.listing import Listing
from t2idist.ingest.parquet_file import ParquetFile
from t2idist.ingest.rejects import Reason
from t2idist.ingest.splits import NamedSplits
from t2idist.observability.progress_bar import track

_BATCH_ROWS = 16
_NAME_COLUMNS = 20


def image_column(schema: pa.Schema, fields: Fields) -> str | None:
    """Return the name of the column with embedded images; None if there is none, or if it is not clear which."""
    columns = [field.name for field in schema if _holds_images(field.type)]
    if fields.image is not None:
        return fields.image if fields.image in columns else None
    usual = [name for name in IMAGE_FIELDS if name in columns]
    return usual[0] if usual else columns[0] if len(columns) == 1 else None


def _holds_images(column_type: pa.DataType) -> bool:
    if pa.types.is_struct(column_type):
        index = column_type.get_field_index("bytes")
        return index >= 0 and _is_binary(column_type.field(index).type)
    return _is_binary(column_type)


def _is_binary(column_type: pa.DataType) -> bool:
    return bool(pa.types.is_binary(column_type) or pa.types.is_large_binary(column_type))


def files_with_images(root: str, names: Sequence[str], fields: Fields) -> dict[str, int]:
    """Return those of the files that have a column with images, with its size in bytes.

    Raises:
        ValueError: a file is damaged.
    """
    sizes = {}
    for name in names:
        with ParquetFile(storage.join(root, name)) as file:
            metadata, column = file.metadata, image_column(file.schema, fields)
        if column is not None:
            sizes[name] = sum(
                chunk.total_uncompressed_size
                for group in range(metadata.num_row_groups)
                for chunk in map(metadata.row_group(group).column, range(metadata.num_columns))
                if chunk.path_in_schema.split(".")[0] == column
            )
    return sizes


def list_parquet(root: str, sizes: Mapping[str, int], listing: Listing, options: FolderOptions, fields: Fields) -> str:
    """List the images in Parquet files. Returns a sentence about the splits.

    Args:
        sizes: the files, relative to `root`, with the bytes of their images.

    Raises:
        ValueError: a file is damaged or lacks a column, or there is no space for the temporary file.
    """
    names = sorted(sizes)
    _check_space(root, sum(sizes.values()), listing)
    classes: dict[str, None] = {}
    with track(names, "file") as tracked:
        for name in tracked:
            for row_name, facts in _rows(storage.join(root, name), name, listing, fields, options.needs_captions):
                if facts["class_name"] is not None:
                    classes[facts["class_name"]] = None
                listing.add_annotation(row_name, facts)
    if options.by_class and not classes:
        raise ValueError("--split-by-class: the data has no classes; name their column with --class-column")
    class_ids = number_classes(classes, listing)
    splits = NamedSplits(names, file_names=True, ignore=not options.split_folders)
    chooser = SplitChooser(options, splits)
    for row_name, (facts,) in listing.annotations():
        class_name = facts["class_name"]
        split = chooser.choose(facts["split"], facts["file"], class_name, row_name)
        if split is None:
            listing.exclude("", row_name, Reason.NO_SPLIT, OUTSIDE_SPLITS)
            continue
        listing.add(
            split, row_name, facts["url"], part=ByteRange(*facts["part"]), captions=facts["captions"],
            attributes=facts["attributes"], class_id=None if class_name is None else class_ids[class_name],
            needs_captions=options.needs_captions,
        )  # fmt: skip
    return chooser.describe()


def _check_space(root: str, needed: int, listing: Listing) -> None:
    """Raise ValueError if the temporary file would not fit."""
    if needed > listing.spool_bytes_free():
        raise ValueError(
            f"{storage.redact(root)}: its images need {needed >> 20} MiB of temporary disk space; "
            f"{listing.spool_bytes_free() >> 20} MiB are free; TMPDIR names the folder for them"
        )


def _rows(
    url: str, name: str, listing: Listing, fields: Fields, needs_captions: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the facts of each row, and copy its image; unusable rows become rejects."""
    with ParquetFile(url) as file:
        schema = file.schema
        image = _checked_image_column(url, schema, fields)
        if needs_captions:
            require_captions(storage.redact(url), fields, schema.names)
        require_named(storage.redact(url), fields, schema.names)
        split = fields.split if fields.split is not None or SPLIT_FIELD not in schema.names else SPLIT_FIELD
        wanted = (image, fields.caption_name(schema.names), fields.attributes, fields.class_name, split)
        columns = list(dict.fromkeys(column for column in wanted if column))
        class_names = _class_names(schema, fields.class_name)
        for number, row in enumerate(file.rows(columns, _BATCH_ROWS), start=1):
            row_name = f"{name}/row {number}"
            facts = _facts(row_name, row[image], row, fields, listing, class_names)
            if facts is not None:
                yield row_name, {**facts, "file": name}


def _checked_image_column(url: str, schema: pa.Schema, fields: Fields) -> str:
    column = image_column(schema, fields)
    if column is None:
        types = ", ".join(f"'{field.name}' {field.type}" for field in list(schema)[:_NAME_COLUMNS])
        wanted = "no column" if fields.image is None else f"column '{fields.image}' is missing or"
        raise ValueError(
            f"{storage.redact(url)}: {wanted} holds no images (binary, or struct<bytes, path>); --image-column names "
            f"it; columns: {types}"[:600]
        )
    return column


def _class_names(schema: pa.Schema, column: str | None) -> list[str]:
    """Return the names of the classes that Hugging Face stores by number with a column, if it does."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
        return [str(name) for name in names]
    except (KeyError, TypeError, ValueError):
        return []


def _facts(
    row_name: str, image: Any, row: dict[str, Any], fields: Fields, listing: Listing, class_names: Sequence[str]
) -> dict[str, Any] | None:
    """Return what a row says, and where the copy of its image is. None: it is unusable, and was rejected."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        path = image.get("path") if isinstance(image, dict) else None
        detail = "the row has no image" + (f", only the path {str(path)[:100]!r}" if path else "")
        listing.exclude("", row_name, Reason.NO_IMAGE, detail)
        return None
    if len(data) > MAX_FILE_BYTES:
        listing.exclude("", row_name, Reason.FILE_TOO_LARGE, f"{len(data)} bytes; at most {MAX_FILE_BYTES}")
        return None
    try:
        facts = fields.read(row, listing.attributes)
    except UndecodableText as error:
        listing.exclude("", row_name, Reason.INVALID_UTF8, str(error))
        return None
    except ValueError as error:
        listing.exclude("", row_name, Reason.MALFORMED, str(error)[:200])
        return None
    class_name = facts.class_name
    if class_names and class_name == "-1":
        class_name = None  # no label
    elif class_name is not None and class_name.isdecimal() and int(class_name) < len(class_names):
        class_name = class_names[int(class_name)]
    url, part = listing.spool(data)
    return {**asdict(facts), "class_name": class_name, "url": url, "part": (part.start, part.length)}
