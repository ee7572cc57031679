"""Reader for Parquet files with embedded images, as Hugging Face stores data sets.

A Parquet file is compressed, and the shards are not in its order. So its images are copied row by row into a temporary
file, from which they are read in the order of the shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t2idist import storage
from t2idist.data.sample_format import MAX_FILE_BYTES
from t2idist.ingest.fields import IMAGE_FIELDS, Fields, require_captions
from t2idist.ingest.files import ByteRange
from t2idist.ingest.flags import parse_attributes
from t2idist.ingest.folder import OUTSIDE_SPLITS, FolderOptions, number_classes
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason
from t2idist.ingest.splits import NamedSplits, split_of_word
from t2idist.ingest.stored_file import each_file, open_file

_BATCH_ROWS = 16
_BUFFER_BYTES = 1 << 20
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
        url = storage.join(root, name)
        try:
            with open_file(url) as file:
                metadata = pq.read_metadata(file)
        except (pa.ArrowException, OSError, EOFError) as error:
            raise _unreadable(url, error) from None
        column = image_column(metadata.schema.to_arrow_schema(), fields)
        if column is not None:
            sizes[name] = sum(
                chunk.total_uncompressed_size
                for group in range(metadata.num_row_groups)
                for chunk in map(metadata.row_group(group).column, range(metadata.num_columns))
                if chunk.path_in_schema.split(".")[0] == column
            )
    return sizes


def _unreadable(url: str, error: Exception) -> ValueError:
    return ValueError(f"{storage.redact(url)}: not a readable parquet file: {str(error)[:200]}")


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
    for name in each_file(names):
        for row_name, facts in _rows(storage.join(root, name), name, listing, fields, options.needs_captions):
            if facts["class_name"] is not None:
                classes[facts["class_name"]] = None
            listing.add_annotation(row_name, facts)
    if options.by_class and not classes:
        raise ValueError("--split-by-class: the data has no classes; name their column with --class-column")
    class_ids = number_classes(classes, listing)
    splits = NamedSplits(names, file_names=True, ignore=not options.split_folders)
    stated = 0
    for row_name, (facts,) in listing.annotations():
        class_name, split = facts["class_name"], facts["split"]
        stated += split is not None
        split = split or options.choose_split(splits, facts["file"], class_name, row_name)
        if split is None:
            listing.exclude("", row_name, Reason.NO_SPLIT, OUTSIDE_SPLITS)
            continue
        listing.add(
            split, row_name, facts["url"], part=ByteRange(*facts["part"]), captions=facts["captions"],
            attributes=facts["attributes"], class_id=None if class_name is None else class_ids[class_name],
            needs_captions=options.needs_captions,
        )  # fmt: skip
    return f"splits: by the column '{fields.split}'" if stated else splits.describe()


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
    try:
        with open_file(url) as file:
            parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES)
            schema = parquet.schema_arrow
            image = _checked_image_column(url, schema, fields)
            if needs_captions:
                require_captions(storage.redact(url), fields, schema.names)
            caption = fields.caption_name(schema.names)
            columns = {"image": image, "caption": caption}
            for kind in ("attributes", "class_name", "split"):
                columns[kind] = _checked_column(url, schema, kind, getattr(fields, kind))
            chosen = {kind: column for kind, column in columns.items() if column is not None}
            class_names = _class_names(schema, fields.class_name)
            number = 0
            for batch in _batches(parquet, list(dict.fromkeys(chosen.values()))):
                values = {kind: _python_values(batch.column(column)) for kind, column in chosen.items()}
                for index in range(batch.num_rows):
                    number += 1
                    row_name = f"{name}/row {number}"
                    row = {kind: column[index] for kind, column in values.items()}
                    facts = _facts(row_name, row, listing, class_names)
                    if facts is not None:
                        yield row_name, {**facts, "file": name}
    except (pa.ArrowException, OSError, EOFError) as error:
        raise _unreadable(url, error) from None


def _batches(parquet: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield a few rows at a time. One iterator over all row groups would keep the memory of each of them."""
    for group in range(parquet.num_row_groups):
        yield from parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)


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


def _checked_column(url: str, schema: pa.Schema, kind: str, column: str | None) -> str | None:
    if column is not None and column not in schema.names:
        option = f"--{kind.removesuffix('_name')}-column"
        names = ", ".join(map(repr, schema.names[:_NAME_COLUMNS]))
        raise ValueError(f"{storage.redact(url)}: no column '{column}' ({option}); columns: {names}")
    return column


def _class_names(schema: pa.Schema, column: str | None) -> list[str]:
    """Return the names of the classes that Hugging Face stores by number with a column, if it does."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
        return [str(name) for name in names]
    except (KeyError, TypeError, ValueError):
        return []


def _python_values(column: pa.Array) -> list[Any]:
    """Convert a column to Python values; bytes that are not UTF-8 become surrogates in texts."""
    column_type = column.type
    if pa.types.is_dictionary(column_type):
        column = column.dictionary_decode()
        column_type = column.type
    if pa.types.is_string(column_type) or pa.types.is_large_string(column_type):
        return [_text(value) for value in column.cast(pa.large_binary()).to_pylist()]
    if pa.types.is_list(column_type) or pa.types.is_large_list(column_type):
        inner = column_type.value_type
        if pa.types.is_string(inner) or pa.types.is_large_string(inner):
            lists = column.cast(pa.large_list(pa.large_binary())).to_pylist()
            return [value and [_text(item) for item in value] for value in lists]
    values: list[Any] = column.to_pylist()
    return values


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "surrogateescape")


def _facts(row_name: str, row: dict[str, Any], listing: Listing, class_names: Sequence[str]) -> dict[str, Any] | None:
    image = row["image"]
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
        named = Fields(caption="caption", class_name="class_name")
        captions, class_name = named.captions(row), named.class_of(row)
        attributes, split = row.get("attributes") or [], row.get("split") or None
        if not isinstance(split, str | None):
            raise ValueError("the split must be a string")
        attributes = [part.strip() for part in attributes.split(",")] if isinstance(attributes, str) else attributes
        attributes = parse_attributes(attributes, "attributes", listing.attributes)
    except ValueError as error:
        listing.exclude("", row_name, Reason.MALFORMED, str(error)[:200])
        return None
    if class_names and class_name == "-1":
        class_name = None  # no label
    elif class_name is not None and class_name.isdecimal() and int(class_name) < len(class_names):
        class_name = class_names[int(class_name)]
    url, part = listing.spool(data)
    return {
        "url": url,
        "part": (part.start, part.length),
        "captions": captions,
        "attributes": [name for name in attributes if name],
        "class_name": class_name,
        "split": split and (split_of_word(split) or split),
    }
