"""CelebA's own layout: img_align_celeba/, list_attr_celeba.txt, list_eval_partition.txt; captions where given."""

from __future__ import annotations

from t2idist import storage
from t2idist.ingest.annotations import captions_by_picture
from t2idist.ingest.files import first_existing, is_picture, is_unsafe, lines, walk
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason

_SPLITS = {"0": "train", "1": "val", "2": "test"}
_ATTRIBUTES = "list_attr_celeba.txt"
_PARTITION = "list_eval_partition.txt"


def list_celeba(root: str, listing: Listing, captions_url: str | None = None) -> None:
    """List all pictures with their attributes by name. captions_url: captions.jsonl (none: pictures have no captions).

    Raises ValueError for missing files and for an attribute list that names no attributes.
    """
    folders = ("img_align_celeba/img_align_celeba", "Img/img_align_celeba", "img_align_celeba")
    images = first_existing([storage.join(root, name) for name in folders], "the folder img_align_celeba")
    attributes = _find(root, _ATTRIBUTES, "Anno")
    partition = _partition(_find(root, _PARTITION, "Eval"), listing)
    captions = {} if captions_url is None else captions_by_picture(captions_url, listing)
    rows = lines(attributes)
    said = next(rows, (0, b""))[1].strip()
    names = next(rows, (0, b""))[1].decode("utf-8", "replace").split()
    if not said.isdigit() or not names:
        raise ValueError(
            f"{storage.redact(attributes)}: the first line must be a count, the second the attributes' names"
        )
    count = 0
    for number, line in rows:
        words = line.decode("utf-8", "replace").split()
        if not words:
            continue
        count += 1
        name, values = words[0], words[1:]
        split = partition.pop(name, None)
        reason, detail = _problem(name, values, split, len(names))
        if reason is not None or split is None:
            where = f"{_ATTRIBUTES}, line {number}"
            listing.left_out(split or "", name, reason or Reason.NO_SPLIT, where + detail)
            if not is_unsafe(name):
                listing.name_file(storage.join(images, name))
            continue
        has = [attribute for attribute, value in zip(names, values, strict=True) if value == "1"]
        listing.add(
            split, name, storage.join(images, name), attributes=has, captions=captions.pop(name, ()),
            needs_captions=captions_url is not None,
        )  # fmt: skip
    if count != int(said):
        detail = f"its first line says {int(said)} rows; it has {count}"
        listing.left_out("", _ATTRIBUTES, Reason.MALFORMED, detail)
    for name in captions:
        listing.left_out("", name, Reason.NO_PICTURE, f"not in {_ATTRIBUTES}")
    for name in walk(images):
        if is_picture(name):
            listing.note_file("", name, storage.join(images, name))
    listing.reject_unnamed_files()


def _problem(name: str, values: list[str], split: str | None, attributes: int) -> tuple[Reason | None, str]:
    if is_unsafe(name):
        return Reason.UNSAFE_NAME, ""
    if split is None:
        return Reason.NO_SPLIT, f": not in {_PARTITION}, or a second time in {_ATTRIBUTES}"
    if len(values) != attributes or set(values) - {"1", "-1"}:
        return Reason.MALFORMED, f": {attributes} values of 1 or -1 must follow the name"
    return None, ""


def _partition(url: str, listing: Listing) -> dict[str, str]:
    """Split by picture."""
    splits: dict[str, str] = {}
    for number, line in lines(url):
        words = line.decode("utf-8", "replace").split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in _SPLITS:
            detail = "a name and 0, 1 or 2 must stand there"
            listing.left_out("", f"{_PARTITION}, line {number}", Reason.MALFORMED, detail)
        elif words[0] in splits:
            detail = f"{_PARTITION}, line {number}: the name comes twice"
            listing.left_out("", words[0], Reason.DUPLICATE, detail)
        else:
            splits[words[0]] = _SPLITS[words[1]]
    return splits


def _find(root: str, name: str, folder: str) -> str:
    return first_existing([storage.join(root, name), storage.join(root, folder, name)], name)
