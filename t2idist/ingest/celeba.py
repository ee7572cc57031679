"""Reader for CelebA: img_align_celeba/, list_attr_celeba.txt and list_eval_partition.txt; optional captions."""

from __future__ import annotations

from t2idist import storage
from t2idist.ingest.annotations import captions_by_image
from t2idist.ingest.files import first_existing, is_image, is_unsafe, read_lines, walk
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason

_SPLITS = {"0": "train", "1": "val", "2": "test"}
_ATTRIBUTES = "list_attr_celeba.txt"
_PARTITION = "list_eval_partition.txt"


def list_celeba(root: str, listing: Listing, captions_url: str | None = None) -> None:
    """List all images with their attributes.

    Args:
        captions_url: a captions.jsonl file. Default: the images have no captions.

    Raises:
        ValueError: a file is missing, or the list of attributes has no names.
    """
    folders = ("img_align_celeba/img_align_celeba", "Img/img_align_celeba", "img_align_celeba")
    images = first_existing([storage.join(root, name) for name in folders], "the folder img_align_celeba")
    attributes = _find(root, _ATTRIBUTES, "Anno")
    partition = _read_partition(_find(root, _PARTITION, "Eval"), listing)
    captions = {} if captions_url is None else captions_by_image(captions_url, listing)
    rows = read_lines(attributes)
    stated_count = next(rows, (0, b""))[1].strip()
    names = next(rows, (0, b""))[1].decode("utf-8", "replace").split()
    if not stated_count.isdigit() or not names:
        raise ValueError(
            f"{storage.redact(attributes)}: the first line must be a count, the second the names of the attributes"
        )
    count = 0
    for number, line in rows:
        fields = line.decode("utf-8", "replace").split()
        if not fields:
            continue
        count += 1
        name, values = fields[0], fields[1:]
        split = partition.pop(name, None)
        reason, detail = _check_row(name, values, split, len(names))
        if reason is not None or split is None:
            location = f"{_ATTRIBUTES}, line {number}"
            listing.exclude(split or "", name, reason or Reason.NO_SPLIT, location + detail)
            if not is_unsafe(name):
                listing.mark_annotated(storage.join(images, name))
            continue
        present = [attribute for attribute, value in zip(names, values, strict=True) if value == "1"]
        listing.add(
            split, name, storage.join(images, name), attributes=present, captions=captions.pop(name, ()),
            needs_captions=captions_url is not None,
        )  # fmt: skip
    if count != int(stated_count):
        detail = f"the first line states {int(stated_count)} rows; the file has {count}"
        listing.exclude("", _ATTRIBUTES, Reason.MALFORMED, detail)
    for name in captions:
        listing.exclude("", name, Reason.NO_IMAGE, f"not in {_ATTRIBUTES}")
    for name in walk(images):
        if is_image(name):
            listing.add_file("", name, storage.join(images, name))
    listing.reject_unannotated_files()


def _check_row(name: str, values: list[str], split: str | None, attributes: int) -> tuple[Reason | None, str]:
    if is_unsafe(name):
        return Reason.UNSAFE_NAME, ""
    if split is None:
        return Reason.NO_SPLIT, f": not in {_PARTITION}, or repeated in {_ATTRIBUTES}"
    if len(values) != attributes or set(values) - {"1", "-1"}:
        return Reason.MALFORMED, f": expected a name and {attributes} values, each 1 or -1"
    return None, ""


def _read_partition(url: str, listing: Listing) -> dict[str, str]:
    """Read the split of each image."""
    splits: dict[str, str] = {}
    for number, line in read_lines(url):
        fields = line.decode("utf-8", "replace").split()
        if not fields:
            continue
        if len(fields) != 2 or fields[1] not in _SPLITS:
            detail = "expected a name and 0, 1 or 2"
            listing.exclude("", f"{_PARTITION}, line {number}", Reason.MALFORMED, detail)
        elif fields[0] in splits:
            detail = f"{_PARTITION}, line {number}: the name is repeated"
            listing.exclude("", fields[0], Reason.DUPLICATE, detail)
        else:
            splits[fields[0]] = _SPLITS[fields[1]]
    return splits


def _find(root: str, name: str, folder: str) -> str:
    return first_existing([storage.join(root, name), storage.join(root, folder, name)], name)
