"""Reader for COCO (2014, 2017): image folders, annotations/captions_*.json, and image_info_*.json for test splits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from t2idist import storage
from t2idist.ingest.files import UndecodableText, is_image, is_unsafe, text_of_file, walk
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Effect, Reason, Reject

_PAPERS_YEAR = "2014"
_ANNOTATIONS = re.compile(r"(captions|image_info)_([A-Za-z0-9_-]+)\.json")


@dataclass(frozen=True)
class CocoSplit:
    """URLs of a split."""

    name: str
    images_url: str
    annotations_url: str
    captions: bool = True
    """False for the test splits of COCO, which have no captions."""


def parse_split(text: str) -> CocoSplit:
    """Parse ``NAME=IMAGES_URL,ANNOTATIONS_URL``. Raises ValueError."""
    name, equals, urls = text.partition("=")
    images_url, comma, annotations_url = urls.partition(",")
    if not (name and equals and images_url and comma and annotations_url):
        raise ValueError(f"--split {text!r}: must be NAME=IMAGES_URL,ANNOTATIONS_URL")
    captions = not annotations_url.rsplit("/", 1)[-1].startswith("image_info_")
    return CocoSplit(name, images_url, annotations_url, captions)


def find_splits(root: str, wanted: Sequence[str] = (), notes: list[str] | None = None) -> list[CocoSplit]:
    """Find the splits in a folder. The name of a split is that of its file without the year (train2014: train).

    Args:
        wanted: names with or without year. Default: all splits with captions; of several years those of 2014, which
            the papers train on and score (train2014, val2014), and those without a year.
        notes: gets a sentence about the years that are left out.

    Raises:
        ValueError: a split is missing, or two years would share a name.
    """
    folder = storage.join(root, "annotations")
    listed = [match for name in storage.list_dir(folder) if (match := _ANNOTATIONS.fullmatch(name))]
    if not listed:
        raise ValueError(
            f"{storage.redact(folder)}: no captions_*.json found; --coco must be the parent folder of annotations"
        )
    chosen = [m for m in listed if m[1] == "captions"] if not wanted else _choose(listed, wanted, folder)
    if not wanted and len(years := {_year(match[2]) for match in chosen} - {""}) > 1 and _PAPERS_YEAR in years:
        chosen = [match for match in chosen if _year(match[2]) in ("", _PAPERS_YEAR)]
        if notes is not None:
            notes.append(f"year {_PAPERS_YEAR} of {', '.join(sorted(years))}; --splits names others")
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
        matches = [m for m in listed if m[2] == name] or [m for m in listed if _without_year(m[2]) == name]
        if not matches:
            available = ", ".join(sorted(m[2] for m in listed))
            raise ValueError(f"--splits {name}: not among the annotations in {storage.redact(folder)} ({available})")
        chosen += [m for m in matches if m[1] == "captions"] or matches
    return chosen


def _without_year(name: str) -> str:
    return re.sub(r"\d+", "", name).strip("-_") or name


def _year(name: str) -> str:
    return "".join(re.findall(r"\d+", name))


def _images(root: str, full: str) -> str:
    names = dict.fromkeys((full, full.replace("-dev", "")))
    candidates = [storage.join(root, *parts) for name in names for parts in ((name,), ("images", name))]
    for url in candidates:
        if storage.exists(url):
            return url
    tried = ", ".join(storage.redact(url) for url in candidates)
    raise ValueError(f"no images of {full}; tried {tried}; use --split NAME=IMAGES_URL,ANNOTATIONS_URL")


def list_coco(splits: Iterable[CocoSplit], listing: Listing) -> None:
    """List the images of all splits. Raises ValueError if a file is not a COCO annotation file."""
    licences: dict[str, None] = {}
    splits = list(splits)
    for split in splits:
        _list_split(split, listing, licences)
    for split in splits:
        for name in walk(split.images_url):
            if is_image(name):
                listing.add_file(split.name, name, storage.join(split.images_url, name))
    listing.reject_unannotated_files()
    listing.licence = "; ".join(licences) or None


def _list_split(split: CocoSplit, listing: Listing, licences: dict[str, None]) -> None:
    file = split.annotations_url.rsplit("/", 1)[-1]
    try:
        content = json.loads(text_of_file(storage.read_bytes(split.annotations_url)))
    except FileNotFoundError:
        raise ValueError(f"{storage.redact(split.annotations_url)}: no such file") from None
    except UndecodableText as error:
        raise ValueError(f"{storage.redact(split.annotations_url)}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{storage.redact(split.annotations_url)}: not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{storage.redact(split.annotations_url)}: not a COCO annotation file: no list of images")
    for licence in content.get("licenses") or []:
        if isinstance(licence, dict) and isinstance(licence.get("name"), str):
            licences[licence["name"]] = None
    captions = _captions(split, file, content.pop("annotations", []), listing)
    seen: set[int] = set()
    for index, image in enumerate(content["images"]):
        entry = f"{file}, images[{index}]"
        if not _has_fields(image, id=int, file_name=str):
            listing.exclude(split.name, entry, Reason.MALFORMED, "an image needs an id and a file_name")
            continue
        image_id, name = image["id"], image["file_name"]
        if is_unsafe(name):
            listing.exclude(split.name, name, Reason.UNSAFE_NAME, entry)
            captions.pop(image_id, None)
            continue
        if image_id in seen:
            listing.exclude(split.name, name, Reason.DUPLICATE, f"{entry}: id {image_id} is repeated")
            listing.mark_annotated(storage.join(split.images_url, name))
            continue
        seen.add(image_id)
        url = storage.join(split.images_url, name)
        listing.add(split.name, name, url, captions=captions.pop(image_id, ()), needs_captions=split.captions)
    for image_id, unused in captions.items():
        if image_id not in seen:
            detail = f"{len(unused)} captions of image id {image_id}, which is not among the images"
            listing.exclude(split.name, file, Reason.NO_IMAGE, detail)


def _captions(split: CocoSplit, file: str, annotations: Any, listing: Listing) -> dict[int, list[str]]:
    """Collect the captions by image id, in the order of the file."""
    captions: dict[int, list[str]] = {}
    ids: set[int] = set()
    for index, annotation in enumerate(annotations if isinstance(annotations, list) else []):
        entry = f"{file}, annotations[{index}]"
        if not _has_fields(annotation, image_id=int, caption=str):
            detail = "an annotation needs an image_id and a caption"
            listing.reject(Reject(split.name, entry, Reason.MALFORMED, Effect.CAPTION_EXCLUDED, detail))
            continue
        annotation_id = annotation.get("id")
        if isinstance(annotation_id, int) and annotation_id in ids:
            detail = f"annotation id {annotation_id} is repeated"
            listing.reject(Reject(split.name, entry, Reason.DUPLICATE, Effect.CAPTION_EXCLUDED, detail))
            continue
        if isinstance(annotation_id, int):
            ids.add(annotation_id)
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return captions


def _has_fields(value: Any, **types: type) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), expected) for key, expected in types.items())
