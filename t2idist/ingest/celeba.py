"""Reader for CelebA: img_align_celeba/, list_attr_celeba and list_eval_partition; captions are optional.

The lists are .txt, as the authors publish them, or .csv, as Kaggle has them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

from t2idist import storage
from t2idist.ingest.annotations import captions_by_image
from t2idist.ingest.attribute_captions import captions_from_attributes
from t2idist.ingest.files import (
    UndecodableText,
    first_existing,
    is_image,
    is_unsafe,
    read_lines,
    text_of_line,
    walk,
)
from t2idist.ingest.flags import attributes_present, is_flag
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason

_SPLITS = {"0": "train", "1": "val", "2": "test"}
_FOLDERS = ("img_align_celeba/img_align_celeba", "Img/img_align_celeba", "img_align_celeba")
_PNG_FOLDERS = ("Img/img_align_celeba_png", "img_align_celeba_png")
"""Of the authors' lossless edition; the lists name .jpg files all the same."""
_ATTRIBUTES = "list_attr_celeba"
_PARTITION = "list_eval_partition"
_DELIMITERS = (",", ";", "\t")


def list_celeba(root: str, listing: Listing, captions_url: str | None = None, *, from_attributes: bool = False) -> None:
    """List all images with their attributes.

    Args:
        captions_url: a captions.jsonl file. Default: the images have no captions.
        from_attributes: make captions from the attributes of each image.

    Raises:
        ValueError: a file is missing, or the list of attributes has no names.
    """
    images = first_existing(
        [storage.join(root, name) for name in (*_FOLDERS, *_PNG_FOLDERS)], "the folder img_align_celeba", root
    )
    attributes = _find(root, _ATTRIBUTES, "Anno")
    partition_url = _find(root, _PARTITION, "Eval")
    partition = _read_partition(partition_url, listing)
    captions = {} if captions_url is None else captions_by_image(captions_url, listing)
    file, partition_file = attributes.rsplit("/", 1)[-1], partition_url.rsplit("/", 1)[-1]
    rows = _rows(attributes)
    names, stated_count = _read_header(attributes, rows)
    count = 0
    for number, fields in rows:
        count += 1
        name, values = fields[0], fields[1:]
        split = partition.pop(name, None)
        reason, detail = _check_row(name, values, split, len(names))
        if reason is Reason.NO_SPLIT:
            detail = f": not in {partition_file}, or repeated in {file}"
        if reason is not None or split is None:
            listing.exclude(split or "", name, reason or Reason.NO_SPLIT, f"{file}, line {number}{detail}")
            if not is_unsafe(name):
                listing.mark_annotated(_image_url(images, name))
            continue
        present = attributes_present(zip(names, values, strict=True), listing.attributes)
        made = captions_from_attributes(name, names, present) if from_attributes else captions.pop(name, ())
        listing.add(
            split, name, _image_url(images, name), attributes=present, captions=made,
            needs_captions=captions_url is not None,
        )  # fmt: skip
    if stated_count is not None and count != stated_count:
        detail = f"the first line states {stated_count} rows; the file has {count}"
        listing.exclude("", file, Reason.MALFORMED, detail)
    for name in captions:
        listing.exclude("", name, Reason.NO_IMAGE, f"not in {file}")
    for name in walk(images):
        if is_image(name):
            listing.add_file("", name, storage.join(images, name))
    listing.reject_unannotated_files()


def _image_url(images: str, name: str) -> str:
    png = images.endswith("_png") and name.lower().endswith(".jpg")
    return storage.join(images, f"{name[:-4]}.png" if png else name)


def _rows(url: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the fields of each line that is not blank: separated by blanks, or as in a CSV file."""
    delimiter = None
    for number, line in read_lines(url):
        try:
            text = text_of_line(line).strip()
        except UndecodableText as error:
            raise ValueError(f"{storage.redact(url)}, line {number}: {error}") from None
        if not url.lower().endswith(".csv"):
            fields = text.split()
        else:
            delimiter = delimiter or max(_DELIMITERS, key=text.count)
            fields = [field.strip() for field in next(csv.reader([text], delimiter=delimiter), [])]
        if any(fields) or number == 1:
            yield number, fields


def _read_header(url: str, rows: Iterator[tuple[int, list[str]]]) -> tuple[list[str], int | None]:
    """Return the names of the attributes, and the number of rows if the file states it."""
    first = next(rows, (0, []))[1]
    if url.lower().endswith(".csv"):
        if len(first) < 2 or set(first[1:]) <= {"1", "-1", "0"}:
            raise ValueError(f"{storage.redact(url)}: the first line must be image_id and the names of the attributes")
        return first[1:], None
    names = next(rows, (0, []))[1]
    if len(first) != 1 or not first[0].isdigit() or not names:
        raise ValueError(
            f"{storage.redact(url)}: the first line must be a count, the second the names of the attributes"
        )
    return names, int(first[0])


def _check_row(name: str, values: list[str], split: str | None, attributes: int) -> tuple[Reason | None, str]:
    if is_unsafe(name):
        return Reason.UNSAFE_NAME, ""
    if split is None:
        return Reason.NO_SPLIT, ""
    if len(values) != attributes or not all(map(is_flag, values)):
        return Reason.MALFORMED, f": expected a name and {attributes} values, each 1 or -1"
    return None, ""


def _read_partition(url: str, listing: Listing) -> dict[str, str]:
    """Read the split of each image."""
    file = url.rsplit("/", 1)[-1]
    splits: dict[str, str] = {}
    for number, fields in _rows(url):
        if not fields or (number == 1 and file.lower().endswith(".csv") and fields[-1] not in _SPLITS):
            continue
        if len(fields) != 2 or fields[1] not in _SPLITS:
            detail = "expected a name and 0, 1 or 2"
            listing.exclude("", f"{file}, line {number}", Reason.MALFORMED, detail)
        elif fields[0] in splits:
            detail = f"{file}, line {number}: the name is repeated"
            listing.exclude("", fields[0], Reason.DUPLICATE, detail)
        else:
            splits[fields[0]] = _SPLITS[fields[1]]
    return splits


def _find(root: str, name: str, folder: str) -> str:
    """Find a list in the form of the authors (.txt) or of Kaggle (.csv)."""
    places = [storage.join(root, *below, name + ending) for ending in (".txt", ".csv") for below in ((), (folder,))]
    return first_existing(places, f"{name}.txt or .csv", root)
