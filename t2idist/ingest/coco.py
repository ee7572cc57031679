"""COCO's own layout: folders of pictures and annotations/captions_*.json (2014, 2017), image_info_*.json for test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from t2idist import storage
from t2idist.ingest.files import is_picture, is_unsafe, walk
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Effect, Reason, Reject

_ANNOTATIONS = re.compile(r"(captions|image_info)_([A-Za-z0-9_-]+)\.json")


@dataclass(frozen=True)
class CocoSplit:
    """Where a split lies. captions: whether its pictures have any (those of COCO's test splits have none)."""

    name: str
    images_url: str
    annotations_url: str
    captions: bool = True


def parse_split(text: str) -> CocoSplit:
    """``NAME=IMAGES_URL,ANNOTATIONS_URL``; raises ValueError."""
    name, equals, urls = text.partition("=")
    images_url, comma, annotations_url = urls.partition(",")
    if not (name and equals and images_url and comma and annotations_url):
        raise ValueError(f"--split {text!r}: give NAME=IMAGES_URL,ANNOTATIONS_URL")
    captions = not annotations_url.rsplit("/", 1)[-1].startswith("image_info_")
    return CocoSplit(name, images_url, annotations_url, captions)


def find_splits(root: str, wanted: Sequence[str] = ()) -> list[CocoSplit]:
    """The splits of a folder; a split's name is its file's without the year (train2014 is train).

    wanted: names with or without year (none: all that have captions). Raises ValueError where one is missing, and where
    two years would be one split.
    """
    folder = storage.join(root, "annotations")
    listed = [found for name in storage.list_dir(folder) if (found := _ANNOTATIONS.fullmatch(name))]
    if not listed:
        raise ValueError(
            f"{storage.redact(folder)}: no captions_*.json there; give --coco the folder above annotations"
        )
    chosen = [m for m in listed if m[1] == "captions"] if not wanted else _choose(listed, wanted, folder)
    splits: dict[str, CocoSplit] = {}
    for match in chosen:
        kind, full = match.groups()
        name = _without_year(full)
        if name in splits:
            other = splits[name].annotations_url.rsplit("/", 1)[-1]
            raise ValueError(
                f"{storage.redact(folder)}: more than one year for split {name} ({other}, {match[0]}); "
                f"choose with --splits, such as --splits {full}"
            )
        images = _images(root, full)
        splits[name] = CocoSplit(name, images, storage.join(folder, match[0]), kind == "captions")
    return list(splits.values())


def _choose(listed: list[re.Match[str]], wanted: Sequence[str], folder: str) -> list[re.Match[str]]:
    chosen = []
    for name in wanted:
        found = [m for m in listed if m[2] == name] or [m for m in listed if _without_year(m[2]) == name]
        with_captions = [m for m in found if m[1] == "captions"]
        if not found:
            there = ", ".join(sorted(m[2] for m in listed))
            raise ValueError(f"--splits {name}: not among the annotations in {storage.redact(folder)} ({there})")
        chosen += with_captions or found
    return chosen


def _without_year(name: str) -> str:
    return re.sub(r"\d+", "", name).strip("-_") or name


def _images(root: str, full: str) -> str:
    names = dict.fromkeys((full, full.replace("-dev", "")))
    candidates = [storage.join(root, *parts) for name in names for parts in ((name,), ("images", name))]
    for url in candidates:
        if storage.exists(url):
            return url
    tried = ", ".join(storage.redact(url) for url in candidates)
    raise ValueError(f"no pictures of {full}; looked for {tried}; or give --split NAME=IMAGES_URL,ANNOTATIONS_URL")


def list_coco(splits: Iterable[CocoSplit], listing: Listing) -> None:
    """List the pictures of all splits. Raises ValueError for a file that is no COCO annotation."""
    licences: dict[str, None] = {}
    splits = list(splits)
    for split in splits:
        _list_split(split, listing, licences)
    for split in splits:
        for name in walk(split.images_url):
            if is_picture(name):
                listing.note_file(split.name, name, storage.join(split.images_url, name))
    listing.reject_unnamed_files()
    listing.licence = "; ".join(licences) or None


def _list_split(split: CocoSplit, listing: Listing, licences: dict[str, None]) -> None:
    where = split.annotations_url.rsplit("/", 1)[-1]
    try:
        whole = storage.read_json(split.annotations_url)
    except FileNotFoundError:
        raise ValueError(f"{storage.redact(split.annotations_url)}: no such file") from None
    if not isinstance(whole, dict) or not isinstance(whole.get("images"), list):
        raise ValueError(f"{storage.redact(split.annotations_url)}: not a COCO annotation file: no list of images")
    for licence in whole.get("licenses") or []:
        if isinstance(licence, dict) and isinstance(licence.get("name"), str):
            licences[licence["name"]] = None
    captions = _captions(split, where, whole.pop("annotations", []), listing)
    seen: set[int] = set()
    for place, image in enumerate(whole["images"]):
        entry = f"{where}, images[{place}]"
        if not _is(image, id=int, file_name=str):
            listing.left_out(split.name, entry, Reason.MALFORMED, "an image needs an id and a file_name")
            continue
        number, name = image["id"], image["file_name"]
        if is_unsafe(name):
            listing.left_out(split.name, name, Reason.UNSAFE_NAME, entry)
            captions.pop(number, None)
            continue
        if number in seen:
            listing.left_out(split.name, name, Reason.DUPLICATE, f"{entry}: id {number} comes twice")
            listing.name_file(storage.join(split.images_url, name))
            continue
        seen.add(number)
        url = storage.join(split.images_url, name)
        listing.add(split.name, name, url, captions=captions.pop(number, ()), needs_captions=split.captions)
    for number, of_none in captions.items():
        if number not in seen:
            detail = f"{len(of_none)} captions of image id {number}, which is not among the images"
            listing.left_out(split.name, where, Reason.NO_PICTURE, detail)


def _captions(split: CocoSplit, where: str, annotations: Any, listing: Listing) -> dict[int, list[str]]:
    """By image id, in the order of the file."""
    captions: dict[int, list[str]] = {}
    ids: set[int] = set()
    for place, annotation in enumerate(annotations if isinstance(annotations, list) else []):
        entry = f"{where}, annotations[{place}]"
        if not _is(annotation, image_id=int, caption=str):
            detail = "an annotation needs an image_id and a caption"
            listing.reject(Reject(split.name, entry, Reason.MALFORMED, Effect.CAPTION_LEFT_OUT, detail))
            continue
        number = annotation.get("id")
        if isinstance(number, int) and number in ids:
            detail = f"annotation id {number} comes twice"
            listing.reject(Reject(split.name, entry, Reason.DUPLICATE, Effect.CAPTION_LEFT_OUT, detail))
            continue
        if isinstance(number, int):
            ids.add(number)
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return captions


def _is(value: Any, **types: type) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), of_type) for key, of_type in types.items())
